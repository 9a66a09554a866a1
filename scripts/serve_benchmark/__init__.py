"""The parts of scripts/benchmark_serve.py: one module for each question that it answers."""
