"""The reader and the writer of Megatron-LM's command lines; knows nothing of other frameworks."""
