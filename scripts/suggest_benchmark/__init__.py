"""Parts of scripts/benchmark_suggest.py."""
