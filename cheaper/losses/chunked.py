"""Losses on hidden states: the logits exist one chunk of tokens at a time, and so does everything made of them.

The gradient is computed in the same pass, so that no chunk of logits is computed twice and none is kept. The idea is
that of "Cut Your Losses" (Wijmans et al., arXiv 2411.09009) and of Liger Kernel's fused linear cross-entropy.

Axes are written as suffixes: N tokens, C tokens of a chunk, D width, V words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from cheaper.losses.words import Words

IGNORED = -100
# By kind of device. A chunk is made of one product: the larger, the fewer passes over the matrix and its gradient. A
# slice of it in fp32 is worked on at a time: on a CPU what its caches hold. The matrix's gradient is added up so many
# words at a time: on a CPU, which has no gain from more, to save memory.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**30}
SLICE_BYTES = {"cpu": 2**24, "cuda": 2**28}
WORDS_AT_ONCE = {"cpu": 2**14, "cuda": 2**20}

# Works on some of a chunk's logits [C, V], given which of its tokens they are and whether the gradient is wanted.
# Returns sums over the targets, first the loss, and leaves the gradient of the loss in the place of the logits.
Work = Callable[[torch.Tensor, slice, bool], tuple[torch.Tensor, ...]]

# Makes ready what all of a chunk needs, given which tokens it has, once for the products and not in slices.
Objective = Callable[[slice], Work]


def chunked_loss(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, words: Words, objective: Objective
) -> tuple[torch.Tensor, ...]:
    """Sums what ``objective`` makes of ``hidden · weightᵀ`` over chunks of tokens.

    Matrix products run in autocast's type where autocast is on; the gradient of ``weight`` is summed over chunks in
    fp32. Where no gradient is wanted, none is computed.

    Args:
        hidden_ND: Floating point.
        weight_VD: Floating point, of the same type outside autocast; may be split over processes.
        words: Whose rows of it are here.
        objective: See ``Objective``.

    Returns:
        The objective's sums, the same in each process that has some of the words; only the first is differentiable,
        and only once.
    """
    return _ChunkedLoss.apply(hidden_ND, words.rows(weight_VD), words, objective)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, words, objective):
        device = hidden_ND.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_ND.dtype
        weight = weight_VD.to(dtype)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.empty_like(weight_VD, dtype=torch.float32) if needs_weight else None
        rows = max(1, CHUNK_BYTES[device.type] // (dtype.itemsize * words.most))
        few = max(1, SLICE_BYTES[device.type] // (4 * words.most))
        at_once = WORDS_AT_ONCE[device.type]
        sums = None
        # A buffer that is used again: fresh memory of this size would cost a CPU more than the arithmetic in it.
        logits_CV = hidden_ND.new_empty(min(rows, hidden_ND.shape[0]), words.number, dtype=dtype)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, max(1, hidden_ND.shape[0]), rows):  # without tokens one chunk, whose sums are 0
                hidden = hidden_ND[start : start + rows].to(dtype)
                logits = torch.mm(hidden, weight.T, out=logits_CV[: hidden.shape[0]])
                work = objective(slice(start, start + rows))
                for first in range(0, max(1, hidden.shape[0]), few):
                    part = slice(first, first + few)
                    parts = work(logits[part], part, needs_hidden or needs_weight)
                    sums = parts if sums is None else tuple(a + b for a, b in zip(sums, parts, strict=True))
                if needs_hidden:
                    grad_hidden[start : start + rows] = logits @ weight
                if needs_weight:
                    for first in range(0, words.number, at_once):
                        some = slice(first, first + at_once)
                        product = logits[:, some].T @ hidden
                        grad_weight[some].add_(product) if start else grad_weight[some].copy_(product)
        if needs_hidden:
            grad_hidden = words.total(grad_hidden)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype) if needs_weight else None)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        # In place: the weight's gradient is large. Autograd notices if the saved tensors are asked for once more.
        return *(None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors), None, None
