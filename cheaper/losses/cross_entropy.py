"""Cross-entropy straight from hidden states, see ``cheaper.losses.chunked``."""

from __future__ import annotations

import functools

import torch

from cheaper.losses.chunked import IGNORED, chunked_loss
from cheaper.losses.words import Words


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy of ``softmax(hidden · weightᵀ)`` against ``labels``, summed over the targets.

    Args:
        hidden_ND: Floating point.
        weight_VD: Floating point, of the same type outside autocast; may be split over processes.
        labels_N: int64, 0 … V-1, or ``IGNORED`` where there is no target.

    Returns:
        The sum of the losses in nats (fp32 scalar, differentiable once), and under ``accuracy`` how many targets are
        the most likely word (int64 scalar).
    """
    words = Words.of(weight_VD)
    loss, correct = chunked_loss(
        hidden_ND, weight_VD, words, lambda chunk: functools.partial(_cross_entropy_, labels_N[chunk], words)
    )
    return loss, {"accuracy": correct}


def _cross_entropy_(labels_N: torch.Tensor, words: Words, logits: torch.Tensor, part: slice, needs_grad: bool):
    """The loss of some logits, whose place their gradient takes: p - onehot(label), 0 where there is no target."""
    labels = labels_N[part]
    is_target = labels != IGNORED
    index = labels.clamp(min=0)[:, None]
    probabilities, log_total, most_likely = words.softmax(logits)
    losses = (log_total - words.at(logits, index))[:, 0]
    hits = (most_likely == index)[:, 0] & is_target
    if needs_grad:
        words.add_at_(probabilities, index, torch.full_like(log_total, -1))
        logits.copy_(probabilities.mul_(is_target[:, None]))
    return (losses * is_target).sum(), hits.sum()
