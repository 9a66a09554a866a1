"""The parts of scripts/benchmark_gradient_quality.py."""
