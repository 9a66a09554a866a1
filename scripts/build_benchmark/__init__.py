"""What benchmark_build.py measured, told as a table."""
