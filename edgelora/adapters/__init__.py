"""What a LoRA adapter is, its two file formats, and the exact combination of many."""
