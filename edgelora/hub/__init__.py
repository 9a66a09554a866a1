"""The Hugging Face Hub: what a repository holds, its files fetched and checked, offline."""
