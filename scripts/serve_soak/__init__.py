"""The parts of scripts/soak.py: what is asked, the answers alone, the clients, the watch."""
