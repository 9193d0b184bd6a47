"""Losses on hidden states: the logits exist one chunk of tokens at a time, and so does everything made of them.

The gradient is computed in the same pass, so that no chunk of logits is computed twice and none is kept. The idea is
that of "Cut Your Losses" (Wijmans et al., arXiv 2411.09009) and of Liger Kernel's fused linear cross-entropy.

Axes are written as suffixes: N tokens, C tokens of a chunk, D width, V words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK_BYTES = 2**26  # of fp32 logits at a time

# Takes the logits [C, V] of a chunk of tokens, which tokens they are, and whether the gradient is wanted. Returns sums
# over the chunk's targets, first the loss, and leaves the gradient of the loss in the place of the logits.
Objective = Callable[[torch.Tensor, slice, bool], tuple[torch.Tensor, ...]]


def chunked_loss(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, ...]:
    """Sums what ``objective`` makes of ``hidden · weightᵀ`` over chunks of tokens.

    Matrix products run in autocast's type where autocast is on; the gradient of ``weight`` is summed over chunks in
    fp32. Where no gradient is wanted, none is computed.

    Args:
        hidden_ND: Floating point.
        weight_VD: Floating point, of the same type outside autocast.
        objective: See ``Objective``.

    Returns:
        The objective's sums; only the first is differentiable, and only once.
    """
    return _ChunkedLoss.apply(hidden_ND, weight_VD, objective)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, objective):
        device = hidden_ND.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_ND.dtype
        weight = weight_VD.to(dtype)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        sums = None
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        with torch.autocast(device.type, enabled=False):
            for start in range(0, hidden_ND.shape[0], rows):
                chunk = slice(start, start + rows)
                hidden = hidden_ND[chunk].to(dtype)
                logits = hidden @ weight.T
                parts = objective(logits, chunk, needs_hidden or needs_weight)
                sums = parts if sums is None else tuple(a + b for a, b in zip(sums, parts, strict=True))
                if needs_hidden:
                    grad_hidden[chunk] = logits @ weight
                if needs_weight:
                    grad_weight += logits.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype) if needs_weight else None)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        # In place: the weight's gradient is large. Autograd notices if the saved tensors are asked for once more.
        return *(None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors), None
