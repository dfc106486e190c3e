"""Reads Hugging Face model configurations. This room knows nothing of other frameworks."""
