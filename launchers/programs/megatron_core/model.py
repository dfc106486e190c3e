"""Sets up Megatron-Core's process groups, and builds this rank's part of the model."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from launchers.programs.harness.attention import soft_capped
from launchers.programs.harness.specs import decoder_block_spec, mtp_block_spec
from launchers.programs.megatron_core.config import ddp_config
from tuner.core.layout import Layout
from tuner.core.workload import Workload


def initialize_grids(workload: Workload, layout: Layout, config: TransformerConfig, seed: int) -> None:
    """Set up Megatron's process groups and random states; the default process group must exist.

    Raises:
        RuntimeError: by Megatron, if the world size is not a multiple of tp*pp*cp or of pp*ep*etp.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        get_embedding_ranks=partial(_embedding_ranks, workload, config),
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _embedding_ranks(workload: Workload, config: TransformerConfig, pp_ranks: list[int]) -> list[int]:
    """Return the ranks of a pipeline that have the word embedding, as Megatron-LM's pretrain_gpt.py chooses them.

    Megatron's default is the first and the last rank, but multi-token prediction has its own copy of the embedding and
    may be on a rank between them.
    """
    ranks = {pp_ranks[0], *get_mtp_ranks(pp_ranks, config)}
    if workload.model.share_embeddings_and_output_weights:
        ranks.add(pp_ranks[-1])
    return sorted(ranks)


def build_model(workload: Workload, layout: Layout, config: TransformerConfig) -> list[GPTModel]:
    """Build this rank's `vpp` model chunks with uninitialised weights; call `initialize_grids` first."""
    vp_stages = range(layout.vpp) if layout.vpp > 1 else [None]
    return [_build_chunk(workload, layout, config, vp_stage) for vp_stage in vp_stages]


def _build_chunk(
    workload: Workload, layout: Layout, config: TransformerConfig, vp_stage: int | None
) -> GPTModel:
    model = workload.model
    decoder = decoder_block_spec(model, config, vp_stage)
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=decoder,
        vocab_size=model.padded_vocab_size(layout.tp),
        max_sequence_length=model.max_position_embeddings or workload.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
        mtp_block_spec=mtp_block_spec(config, decoder, vp_stage),
        vp_stage=vp_stage,
    )
    if model.final_logit_softcapping is not None and chunk.post_process:
        chunk.output_layer.register_forward_hook(partial(_cap_logits, model.final_logit_softcapping))
    return chunk


def _cap_logits(bound: float, layer: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> Any:
    logits, bias = output
    return soft_capped(logits, bound), bias


def wrap_for_training(
    chunks: list[GPTModel], workload: Workload, layout: Layout, device: torch.device
) -> list[DistributedDataParallel]:
    """Move the chunks to the device, convert them to their precision, and wrap them in DistributedDataParallel."""
    wrapped = []
    for number, chunk in enumerate(chunks):
        config, module = chunk.config, chunk.to(device)
        for parameter in module.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        if config.fp16 or config.bf16:
            module = Float16Module(config, module)
            _keep_expert_bias_in_fp32(module)
        # Only the first chunk's gradients are worth sending in pieces (Megatron-LM: training.py, get_model).
        ddp = ddp_config(workload, layout)
        wrapped.append(DistributedDataParallel(config, ddp, module, disable_bucketing=number > 0))
    return wrapped


def _keep_expert_bias_in_fp32(module: Any) -> None:
    for submodule in module.modules():
        if hasattr(submodule, "_maintain_float32_expert_bias"):
            submodule._maintain_float32_expert_bias()
