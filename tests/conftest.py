"""Shared by every test; its presence puts this folder (pico) on the path of tests/parity too."""
