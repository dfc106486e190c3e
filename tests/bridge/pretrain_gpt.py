"""A user's training script: Megatron-LM's own arguments, training loop and log, on CPU ranks.

Megatron-LM's wheel lacks its pretrain_gpt.py; this script does what that one does. Calls that need CUDA are answered
as in our own programs, and the log reports the memory of the process.
"""

from launchers.programs.megatron_bridge.cpu import hide_transformer_engine

hide_transformer_engine()

import functools  # noqa: E402
import resource  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.training import get_args, get_tokenizer, initialize, training  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from launchers.programs.harness.cpu import enable_cpu  # noqa: E402


def model_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **other: Any
) -> GPTModel:
    """Return the model of the command line."""
    args = get_args()
    config = core_transformer_config_from_args(args)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        vp_stage=vp_stage,
    )


def datasets(sizes: Any, vp_stage: int | None = None) -> Any:
    """Return data sets of mock tokens."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()


def forward_step(data_iterator: Iterator[Any], model: Any, *other: Any) -> Any:
    """Run one micro-batch forward; return its output and the function of its loss."""
    batch = next(data_iterator)
    tokens, labels = batch["tokens"], batch["labels"]
    output = model(tokens, batch["position_ids"], None, labels=labels)

    def loss_of(output: torch.Tensor) -> Any:
        losses = output.float().view(-1)
        total, count = losses.sum(), torch.tensor(losses.numel(), dtype=torch.int)
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    return output, loss_of


def _suit_cpu() -> None:
    enable_cpu()
    cuda: Any = torch.cuda
    cuda.device_count = lambda: 1
    # Megatron-LM asks nothing of a device of this generation.
    cuda.get_device_properties = lambda *args: SimpleNamespace(major=10, minor=0, name="cpu")
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *args: (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    initialize._compile_dependencies = lambda: None  # the wheel holds them compiled
    barrier = dist.barrier
    dist.barrier = lambda *args, device_ids=None, **kwargs: barrier(*args, **kwargs)


if __name__ == "__main__":
    _suit_cpu()
    datasets.is_distributed = True  # type: ignore[attr-defined]
    arguments = parse_and_validate_args()
    training.pretrain(
        pretrain_cfg_container_from_args(arguments),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
    )
