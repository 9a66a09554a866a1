"""Parts of scripts/benchmark_early_exit.py."""
