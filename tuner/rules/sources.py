"""The places in Megatron that refuse a layout and that several modules of rules cite."""

TRANSFORMER_CONFIG = "megatron/core/transformer/transformer_config.py"
VALIDATE_ARGS = "megatron/training/arguments.py, validate_args"
