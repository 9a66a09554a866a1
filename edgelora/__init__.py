"""EdgeLoRA: a LoRA adapter for your task on a CPU, combined from a bank instead of trained."""

import os

__version__ = "0.1.0"

# OpenBLAS's idle threads sleep at once. By default they spin for a while, in the way of those of
# llama.cpp, which take turns with them in a gradient: with a small base up to a third of its time.
# OpenBLAS reads this when numpy is imported, so it stands before that.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
