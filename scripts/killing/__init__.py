"""Commands to be killed, and what has to be true afterwards."""
