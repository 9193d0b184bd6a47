"""Matrices over the devices of a machine: tensor, sequence, vocabulary and expert parallelism.

Each device has some heads, some features of the feed-forward networks, some experts and some words (Megatron-LM,
arXiv 1909.08053). Between them, where norms and sums work token by token, it has some tokens of each row instead
(arXiv 2205.05198). The losses put the parts of the vocabulary together, see ``cheaper.losses.words``.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from cheaper.config import ModelConfig
from cheaper.errors import UserError
from cheaper.models.decoder import Block, Decoder
from cheaper.models.moe import Experts, LatentAttention

TOKENS = Shard(1)  # of hidden states [B, T, D]


def check_degree(model: ModelConfig, degree: int) -> None:
    """Raises ``UserError`` naming what ``degree`` devices cannot share evenly."""
    shared = {"model.num_heads": model.num_heads, "model.intermediate_size": model.intermediate_size}
    if model.latent_attention is None:
        shared["model.num_kv_heads"] = model.num_kv_heads
    if model.experts:
        shared["model.experts.number"] = model.experts.number
        shared["model.experts.intermediate_size"] = model.experts.shared * model.experts.intermediate_size
    for key, count in shared.items():
        if count % degree:
            raise UserError(f"distributed.tensor_parallel_degree is {degree}: expected a divisor of {key}={count}")


def split_matrices(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Gives this process its part of every matrix.

    Args:
        decoder: The model; may be without memory (on the meta device).
        mesh: One dimension, over the devices that work on the same rows.
    """
    parallelize_module(decoder, mesh, _plan(decoder))


def split_dimensions(decoder: Decoder) -> dict[str, int]:
    """The dimension along which each parameter that ``split_matrices`` splits is split."""
    split = {"embedding.weight": 0}
    for name, style in _plan(decoder).items():
        for part in style.styles if isinstance(style, _Both) else [style]:
            if isinstance(part, _Placed):
                split |= {f"{name}.{key}": at.dim for key, at in part.placements.items() if at.is_shard()}
            elif isinstance(part, ColwiseParallel | RowwiseParallel) and name != "embedding":
                split[f"{name}.weight"] = int(isinstance(part, RowwiseParallel))
    return split


def _plan(decoder: Decoder) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=TOKENS, use_local_output=False),
        "norm": SequenceParallel(use_local_output=False),
    }
    if decoder.head is not None:
        plan["head"] = _Placed(weight=Shard(0))
    for number, block in enumerate(decoder.blocks):
        plan |= {f"blocks.{number}.{name}": style for name, style in _block_plan(block).items()}
    return plan


def _block_plan(block: Block) -> dict[str, ParallelStyle]:
    plan = {
        "attention_norm": SequenceParallel(use_local_output=False),
        "attention": _gather_tokens(inputs=4),
        "attention.wo": _columns_to_tokens(),
        "feed_forward_norm": SequenceParallel(use_local_output=False),
        "feed_forward": _gather_tokens(inputs=1),
    }
    if isinstance(block.attention, LatentAttention):
        whole = ("wq_down", "query_norm", "wkv_down", "key_value_norm")
        plan |= {f"attention.{name}": _Placed(weight=Replicate()) for name in whole}
        plan |= {f"attention.{name}": ColwiseParallel() for name in ("wq_up", "wkv_up")}
    else:
        plan |= {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    network = "feed_forward"
    if isinstance(block.feed_forward, Experts):
        plan[f"{network}.router"] = _Placed(weight=Replicate())
        plan[network] = _Both(plan[network], _Placed(gate=Shard(0), up=Shard(0), down=Shard(0)))
        network = "feed_forward.shared"
    plan |= {f"{network}.{name}": ColwiseParallel() for name in ("gate", "up")}
    return plan | {f"{network}.down": _columns_to_tokens()}


def _gather_tokens(inputs: int) -> PrepareModuleInput:
    """Every token of the first of a module's ``inputs``, where it got some."""
    others = (None,) * (inputs - 1)
    return PrepareModuleInput(
        input_layouts=(TOKENS, *others), desired_input_layouts=(Replicate(), *others), use_local_output=False
    )


def _columns_to_tokens() -> RowwiseParallel:
    """Products of parts of the columns, summed over devices, of which each gets some tokens."""
    return RowwiseParallel(output_layouts=TOKENS, use_local_output=False)


class _Placed(ParallelStyle):
    """Parameters of a module placed as told; what goes in and comes out stays as it is."""

    def __init__(self, **placements: Replicate | Shard):
        super().__init__()
        self.placements = placements

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, placement in self.placements.items():
            placed = distribute_tensor(getattr(module, name), device_mesh, [placement])
            module.register_parameter(name, nn.Parameter(placed))
        return module


class _Both(ParallelStyle):
    def __init__(self, *styles: ParallelStyle):
        super().__init__()
        self.styles = styles

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for style in self.styles:
            module = style._apply(module, device_mesh)
        return module
