"""EdgeLoRA: a LoRA adapter for your task on a CPU, combined from a bank instead of trained."""

__version__ = "0.1.0"
