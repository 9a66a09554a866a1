"""Files changed at random, and what EdgeLoRA makes of them."""
