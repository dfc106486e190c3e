"""Recipes in the form that a user writes, small enough for a CPU."""

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.training.config import ConfigContainer
from torch.nn.functional import silu


def tiny_gpt(num_layers: int = 4, global_batch_size: int = 8, hidden_size: int = 64) -> ConfigContainer:
    """Return a Llama of a few layers, built on the config that every library recipe starts from."""
    config = _pretrain_common()
    config.model = GPTModelProvider(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=2 * hidden_size,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=hidden_size // 4,
        seq_length=64,
        vocab_size=512,
        normalization="RMSNorm",
        activation_func=silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=2,
    )
    config.dataset.seq_length = 64
    config.train.global_batch_size = global_batch_size
    config.train.micro_batch_size = 1
    config.tokenizer.tokenizer_type = "NullTokenizer"
    config.tokenizer.vocab_size = 512
    config.mixed_precision = None
    return config


def tiny_moe() -> ConfigContainer:
    """Return a mixture of experts like Qwen 3's, without the loss that balances the experts."""
    config = tiny_gpt()
    config.model.num_moe_experts = 8
    config.model.moe_ffn_hidden_size = 64
    config.model.moe_router_topk = 2
    config.model.moe_router_load_balancing_type = "none"
    config.model.moe_token_dispatcher_type = "alltoall"
    config.model.expert_model_parallel_size = 2
    return config
