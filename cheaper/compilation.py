"""The training step through ``torch.compile``: fewer, larger kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cheaper.losses.cross_entropy import compiled_cross_entropy
from cheaper.models.composer_model import CausalLM
from cheaper.models.decoder import Block
from cheaper.models.moe import Experts


def compile_training(model: CausalLM) -> None:
    """Compiles each block, and on a GPU the cross-entropy; names and values of parameters stay as they are.

    All blocks have one graph, with what is recomputed and how matrices are split in it. Sharding gathers parameters
    around a block's call, outside. Blocks with experts stay as they are: how many tokens each gets is in the data.

    Args:
        model: Divided and with its activations checkpointed, if it will be.
    """
    torch._dynamo.config.optimize_ddp = False  # blocks are small already, and it cannot cut what is recomputed
    for block in model.model.blocks:
        if isinstance(block.feed_forward, Experts):
            continue
        block.forward = _while_training(block, torch.compile(block.forward), block.forward)
    if torch.cuda.is_available():
        model.cross_entropy = compiled_cross_entropy()


def _while_training(
    block: Block, compiled: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Evaluation and sampling have a new shape in every call: compiling would take longer than it saves."""

    def forward(*inputs) -> torch.Tensor:
        return compiled(*inputs) if block.training else plain(*inputs)

    return forward
