"""The reader and the writer of Megatron-LM's command lines.

This room knows nothing of other frameworks.
"""
