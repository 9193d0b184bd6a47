"""Cross-entropy straight from hidden states, see ``cheaper.losses.chunked``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from cheaper.losses.chunked import IGNORED, chunked_loss
from cheaper.losses.words import Words

# From logits [C, V], whose place their gradient takes where it is wanted, and labels [C] to the loss and the hits.
OnePass = Callable[[torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor]]


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor, one_pass: OnePass | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy of ``softmax(hidden · weightᵀ)`` against ``labels``, summed over the targets.

    Args:
        hidden_ND: Floating point.
        weight_VD: Floating point, of the same type outside autocast; may be split over processes.
        labels_N: int64, 0 … V-1, or ``IGNORED`` where there is no target.
        one_pass: Works on logits where the vocabulary is in one process, see ``compiled_cross_entropy``.

    Returns:
        The sum of the losses in nats (fp32 scalar, differentiable once), and under ``accuracy`` how many targets are
        the most likely word (int64 scalar).
    """
    words = Words.of(weight_VD)
    loss, correct = chunked_loss(
        hidden_ND, weight_VD, words, lambda chunk: functools.partial(_cross_entropy_, labels_N[chunk], words, one_pass)
    )
    return loss, {"accuracy": correct}


def compiled_cross_entropy() -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """``linear_cross_entropy`` whose work on logits ``torch.compile`` fuses: they are read twice and written once."""
    return functools.partial(linear_cross_entropy, one_pass=torch.compile(_one_pass_))


def _cross_entropy_(
    labels_N: torch.Tensor,
    words: Words,
    one_pass: OnePass | None,
    logits: torch.Tensor,
    part: slice,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of some logits, whose place their gradient takes: p - onehot(label), 0 where there is no target."""
    labels = labels_N[part]
    if one_pass and not words.group:
        return one_pass(logits, labels, needs_grad)
    is_target = labels != IGNORED
    index = labels.clamp(min=0)[:, None]
    probabilities, log_total, most_likely = words.softmax(logits)
    losses = (log_total - words.at(logits, index))[:, 0]
    hits = (most_likely == index)[:, 0] & is_target
    if needs_grad:
        words.add_at_(probabilities, index, torch.full_like(log_total, -1))
        logits.copy_(probabilities.mul_(is_target[:, None]))
    return (losses * is_target).sum(), hits.sum()


def _one_pass_(logits_CV: torch.Tensor, labels_C: torch.Tensor, needs_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as ``_cross_entropy_``, without a step that a compiler could not fuse with its neighbours."""
    is_target, x_CV = labels_C != IGNORED, logits_CV.float()
    log_total_C1 = x_CV.logsumexp(-1, keepdim=True)
    losses_C = (log_total_C1 - x_CV.gather(1, labels_C.clamp(min=0)[:, None]))[:, 0]
    hits_C = (x_CV.argmax(-1) == labels_C) & is_target
    if needs_grad:
        is_label_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == labels_C[:, None]
        logits_CV.copy_(((x_CV - log_total_C1).exp() - is_label_CV.float()) * is_target[:, None])
    return (losses_C * is_target).sum(), hits_C.sum()
