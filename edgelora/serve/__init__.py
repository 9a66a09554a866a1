"""An OpenAI-compatible server: requests, their scheduling on one engine thread, and the page."""
