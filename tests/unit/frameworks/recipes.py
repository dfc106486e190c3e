"""A recipe of Megatron Bridge as its plain values: a dense Llama on 8 H100s."""

from typing import Any

from tuner.frameworks.megatron_bridge.facts import RecipeFacts

DENSE: dict[str, Any] = {
    "model.num_layers": 32,
    "model.hidden_size": 4096,
    "model.ffn_hidden_size": 14336,
    "model.num_attention_heads": 32,
    "model.num_query_groups": 8,
    "model.kv_channels": 128,
    "model.vocab_size": 128256,
    "model.activation_func": "silu",
    "model.gated_linear_unit": True,
    "model.position_embedding_type": "rope",
    "model.rotary_base": 500000.0,
    "model.num_moe_experts": None,
    "model.moe_router_topk": 2,
    "model.bf16": True,
    "model.seq_length": 8192,
    "model.tensor_model_parallel_size": 2,
    "model.pipeline_model_parallel_size": 2,
    "model.virtual_pipeline_model_parallel_size": None,
    "model.context_parallel_size": 1,
    "model.cp_comm_type": "a2a",
    "model.sequence_parallel": True,
    "model.moe_token_dispatcher_type": "allgather",
    "model.cuda_graph_impl": "none",
    "model.cuda_graph_modules": ["attn"],
    "model.cpu_offloading": False,
    "model.cpu_offloading_num_layers": 31,
    "model.recompute_modules": ["core_attn"],
    "ddp.overlap_grad_reduce": True,
    "ddp.data_parallel_sharding_strategy": "optim_grads_params",
    "train.micro_batch_size": 1,
    "train.global_batch_size": 128,
    "dataset.seq_length": 8192,
    "env_vars": {"NCCL_NVLS_ENABLE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
}


def facts(**changed: Any) -> RecipeFacts:
    """The recipe with changed values; `__` in a name stands for the dot of a path."""
    values = {**DENSE, **{key.replace("__", "."): value for key, value in changed.items()}}
    return RecipeFacts(name="llama_pretrain_8gpu_h100_config", gpus=8, gpu="h100", values=values)


def as_saved(values: dict[str, Any]) -> dict[str, Any]:
    """A run_config.yaml of the values, in the nodes that Bridge writes for what is no plain data."""
    saved: dict[str, Any] = {"_target_": "megatron.bridge.training.config.ConfigContainer"}
    for path, value in values.items():
        group, _, name = path.rpartition(".")
        section = saved.setdefault(group, {"_target_": f"megatron.bridge.{group}"}) if group else saved
        section[name] = value
    saved["model"]["_target_"] = "megatron.bridge.models.gpt_provider.GPTModelProvider"
    saved["model"]["activation_func"] = {"_target_": "torch.nn.functional.silu", "_call_": False}
    saved["model"]["cuda_graph_modules"] = [
        {"_target_": "megatron.core.enums.CudaGraphModule", "_call_": True, "_args_": [1], "_name_": "attn"}
    ]
    return saved
