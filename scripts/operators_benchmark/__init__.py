"""The parts of scripts/benchmark_operators.py."""
