"""Hugging Face model configurations: what reads them; knows nothing of other frameworks."""
