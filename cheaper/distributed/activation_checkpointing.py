"""Activations that are computed again in the backward pass instead of being kept (arXiv 1604.06174)."""

from __future__ import annotations

from collections import Counter
from types import MethodType

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cheaper.models.decoder import Block, Decoder

# Attention kernels by name: flash-attn's and PyTorch's for documents of many lengths exist once their module is there.
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "torch_attn::_varlen_attn",
}


def checkpoint_activations(decoder: Decoder, mode: str) -> None:
    """Makes each block recompute its activations; names and values of parameters stay as they are.

    Args:
        decoder: The model.
        mode: ``none``; ``full``, which keeps a block's input alone; ``selective``, which also keeps what is expensive:
            the attention's output and every second matrix product, as torchtitan does. (A CPU's attention in bf16 is
            made of many operators and computed again.)
    """
    if mode == "none":
        return
    kept = {"context_fn": _keep_expensive} if mode == "selective" else {}

    def forward(block: Block, *inputs) -> torch.Tensor:
        return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, **kept)

    for block in decoder.blocks:
        # Within the block's call, so that sharding, which gathers parameters around it, gathers them once; and one
        # function for all of them, which is compiled once.
        block.forward = MethodType(forward, block)


def _keep_expensive():
    products: Counter[bool] = Counter()

    def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
        keep = operator.name() in ATTENTION
        if operator == torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
