"""The reader of Hugging Face model configurations; knows nothing of other frameworks."""
