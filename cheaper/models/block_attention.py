"""Causal attention for processors: blocks of queries against all the keys they see, as batched matrix products.

PyTorch's fused attention for CPUs keeps to small tiles, in which matrix products run far below the processor's rate.
Here a tile is as large as the caches hold, the blocks above the diagonal are never computed, and query heads that share
a key head are rows of one product, so that keys are not repeated. Scores are computed again in the backward pass.

Axes are written as suffixes: G key heads of all rows, R query heads of each, T tokens, E features, N tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries at a time
TILE_BYTES = 2**24  # of scores at a time


def block_attention(q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor) -> torch.Tensor:
    """Softmax attention of each token to itself and those before it, scaled by 1/√E.

    Args:
        q_BTHE: Queries, H heads; floating point.
        k_BTKE: Keys of the same type; each of the K heads serves H/K query heads.
        v_BTKE: Values of the same type; their features may be more or fewer than the keys'.

    Returns:
        [B, T, H, features of the values]; once differentiable.
    """
    rows, heads = q_BTHE.shape[0], k_BTKE.shape[2]
    q_GRTE = q_BTHE.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k_GTE, v_GTE = (x.transpose(1, 2).flatten(0, 1) for x in (k_BTKE, v_BTKE))
    out_GRTE = _BlockAttention.apply(q_GRTE, k_GTE, v_GTE)
    return out_GRTE.unflatten(0, (rows, heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_GRTE, k_GTE, v_GTE):
        out_GRTE = q_GRTE.new_empty(*q_GRTE.shape[:-1], v_GTE.shape[-1])
        for groups, queries, keys in _tiles(q_GRTE):
            p = _probabilities(q_GRTE[groups, :, queries], k_GTE[groups, keys])
            out_GRTE[groups, :, queries] = torch.bmm(p, v_GTE[groups, keys]).unflatten(1, (q_GRTE.shape[1], -1))
        ctx.save_for_backward(q_GRTE, k_GTE, v_GTE)
        return out_GRTE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_GRTE):
        q_GRTE, k_GTE, v_GTE = ctx.saved_tensors
        scale = 1 / math.sqrt(q_GRTE.shape[-1])
        grad_q = torch.empty_like(q_GRTE)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k_GTE, v_GTE))
        for groups, queries, keys in _tiles(q_GRTE):
            q, grad = (x[groups, :, queries].flatten(1, 2) for x in (q_GRTE, grad_GRTE))
            p = _probabilities(q_GRTE[groups, :, queries], k_GTE[groups, keys])
            grad_v[groups, keys] += torch.bmm(p.mT, grad)
            grad_p = torch.bmm(grad, v_GTE[groups, keys].mT)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_k[groups, keys] += torch.bmm(grad_scores.mT, q)
            grad_q[groups, :, queries] = torch.bmm(grad_scores, k_GTE[groups, keys]).view_as(grad_q[groups, :, queries])
        return grad_q.mul_(scale), grad_k.mul_(scale).to(k_GTE.dtype), grad_v.to(v_GTE.dtype)


def _tiles(q_GRTE: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Which key heads, queries and keys are worked on together."""
    heads, shared, tokens, _ = q_GRTE.shape
    together = max(1, TILE_BYTES // (q_GRTE.itemsize * shared * min(BLOCK, tokens) * tokens))
    for first in range(0, heads, together):
        for start in range(0, tokens, BLOCK):
            end = min(start + BLOCK, tokens)
            yield slice(first, first + together), slice(start, end), slice(0, end)


def _probabilities(q_GRNE: torch.Tensor, k_GTE: torch.Tensor) -> torch.Tensor:
    """Of attending to each of the keys, of which the last N are the queries' own; [G, R · N, T]."""
    N = q_GRNE.shape[2]
    q_GME = (q_GRNE / math.sqrt(q_GRNE.shape[-1])).flatten(1, 2)
    scores = torch.bmm(q_GME, k_GTE.mT)
    later = torch.ones(N, N, dtype=torch.bool, device=scores.device).triu(1)
    scores.unflatten(1, (-1, N))[..., -N:].masked_fill_(later, float("-inf"))
    return scores.softmax(-1)
