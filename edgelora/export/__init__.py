"""An adapter for other programs: Ollama's Modelfile, and llama-server's command line."""
