"""Knowledge distillation straight from hidden states: neither model's logits exist beyond a chunk of tokens.

The loss of a target is

    α · T² · divergence(p, q) + (1 - α) · cross-entropy        (Hinton et al., arXiv 1503.02531, section 2)

where p and q are the teacher's and the student's distributions at temperature T. ``linear_distillation`` has the
teacher's hidden states; ``sparse_distillation`` only some of its probabilities, from a cache or of its top words.

Where two models have different numbers of words, as when one is padded, both distributions are over the words that
both have.

Axes are written as suffixes: N tokens, C tokens of a chunk, D and E widths, V words, K kept words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cheaper.config import DistillationConfig
from cheaper.losses.chunked import IGNORED, Work, chunked_loss
from cheaper.losses.words import Words

SUMS = ("kd_loss", "cross_entropy", "accuracy", "teacher_agreement")


@dataclass(frozen=True)
class SparseTeacher:
    """What is kept of a teacher's distribution at each token.

    Args:
        ids_NK: int64, the kept words; where fewer than K are kept the rest have probability 0.
        probabilities_NK: fp32, at the temperature of the distillation.
        tail_N: fp32, the mass of all other words, kept as one bucket; ``None`` where ``probabilities`` is an unbiased
            estimate of the whole distribution.
        entropy_N: fp32, of the whole distribution in nats; needed where there is no tail.
        most_likely_N: int64.
    """

    ids_NK: torch.Tensor
    probabilities_NK: torch.Tensor
    tail_N: torch.Tensor | None
    entropy_N: torch.Tensor | None
    most_likely_N: torch.Tensor

    @classmethod
    def top(cls, logits_NV: torch.Tensor, k: int, temperature: float, words: Words | None = None) -> SparseTeacher:
        """The ``k`` most likely words of ``logits``, all or this process's, and the rest in one bucket."""
        words = words or Words.all(logits_NV.shape[1])
        probabilities, *_ = words.softmax(logits_NV.float() / temperature)
        values, ids = words.top(probabilities, k)
        # Not 1 - Σ kept, which cancels.
        rest = words.total(words.put_at_(probabilities, ids, torch.zeros_like(values)).sum(-1))
        return cls(ids, values, rest, None, ids[:, 0])

    @classmethod
    def sampled(cls, logits_NV: torch.Tensor, k: int, temperature: float, generator: torch.Generator) -> SparseTeacher:
        """``k`` words drawn from the distribution of ``logits``, with repetition; each stands for 1/k of it."""
        log_p = (logits_NV.float() / temperature).log_softmax(-1)
        probabilities = log_p.exp()
        ids = torch.multinomial(probabilities, k, replacement=True, generator=generator)
        entropy = -torch.linalg.vecdot(probabilities, log_p)
        return cls(ids, torch.full_like(ids, 1 / k, dtype=torch.float32), None, entropy, logits_NV.argmax(-1))

    def rows(self, chunk: slice) -> SparseTeacher:
        parts = (self.ids_NK, self.probabilities_NK, self.tail_N, self.entropy_N, self.most_likely_N)
        return SparseTeacher(*(None if part is None else part[chunk] for part in parts))


def linear_distillation(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    teacher_hidden_NE: torch.Tensor,
    teacher_weight_VE: torch.Tensor,
    settings: DistillationConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Distillation from a teacher's hidden states and output matrix, summed over the targets.

    Args:
        hidden_ND: The student's; floating point.
        weight_VD: The student's output matrix.
        labels_N: int64, 0 … V-1, or ``IGNORED`` where there is no target and so no loss of either kind.
        teacher_hidden_NE: The teacher's; takes no gradient.
        teacher_weight_VE: The teacher's output matrix, of the same type as its hidden states.
        settings: α, T, the divergence, and how many of the teacher's words count (``top_k``).

    Returns:
        The sum of the losses in nats (fp32 scalar, differentiable once), and the sums of ``kd_loss`` (T² · divergence),
        ``cross_entropy``, ``accuracy`` and ``teacher_agreement`` (both find the same word most likely).
    """
    words = Words.of(weight_VD, limit=min(weight_VD.shape[0], teacher_weight_VE.shape[0]))
    teacher_weight = words.rows(teacher_weight_VE)

    def objective(chunk: slice) -> Work:
        teacher_logits_CV, labels_C = teacher_hidden_NE[chunk] @ teacher_weight.T, labels_N[chunk]

        def work(logits_CV: torch.Tensor, part: slice, needs_grad: bool) -> tuple[torch.Tensor, ...]:
            theirs, labels = teacher_logits_CV[part], labels_C[part]
            if settings.top_k:
                teacher = SparseTeacher.top(theirs, settings.top_k, settings.temperature, words)
                return _sparse_(teacher, labels, settings, words, logits_CV, needs_grad)
            return _dense_(theirs, labels, settings, words, logits_CV, needs_grad)

        return work

    loss, *sums = chunked_loss(hidden_ND, weight_VD, words, objective)
    return loss, dict(zip(SUMS, sums, strict=True))


def sparse_distillation(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    teacher: SparseTeacher,
    settings: DistillationConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Distillation by forward KL from what was kept of the teacher; returns what ``linear_distillation`` returns.

    With a tail, the words that were not kept are one bucket for the student too. Without one,
    KL = Σ p̂ · (-log q) - H(p) is unbiased where p̂ is, and so is its gradient q - p̂ ("Sparse Logit Sampling",
    Anshumann et al., ACL 2025, section 4).
    """

    words = Words.of(weight_VD)

    def objective(chunk: slice) -> Work:
        kept, labels_C = teacher.rows(chunk), labels_N[chunk]

        def work(logits_CV: torch.Tensor, part: slice, needs_grad: bool) -> tuple[torch.Tensor, ...]:
            return _sparse_(kept.rows(part), labels_C[part], settings, words, logits_CV, needs_grad)

        return work

    loss, *sums = chunked_loss(hidden_ND, weight_VD, words, objective)
    return loss, dict(zip(SUMS, sums, strict=True))


class _Student(NamedTuple):
    """One chunk of the student's distribution, fp32."""

    log_q_CV: torch.Tensor  # at the temperature
    cross_entropy_C: torch.Tensor
    most_likely_C: torch.Tensor


def _student(logits_CV: torch.Tensor, index_C1: torch.Tensor, temperature: float, words: Words) -> _Student:
    log_q = words.log_softmax(logits_CV if temperature == 1 else logits_CV / temperature)
    plain = log_q if temperature == 1 else words.log_softmax(logits_CV)
    return _Student(log_q, -words.at(plain, index_C1)[:, 0], words.most_likely(logits_CV))


def _dense_(
    teacher_logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    settings: DistillationConfig,
    words: Words,
    logits_CV: torch.Tensor,
    needs_grad: bool,
) -> tuple[torch.Tensor, ...]:
    student = _student(logits_CV, labels_C.clamp(min=0)[:, None], settings.temperature, words)
    most_likely = words.most_likely(teacher_logits_CV)
    scaled = teacher_logits_CV if settings.temperature == 1 else teacher_logits_CV / settings.temperature
    divergence_of = DIVERGENCES[settings.divergence]
    divergence, gradient = divergence_of(words.log_softmax(scaled), student.log_q_CV, settings.beta, words)
    return _finish_(student, divergence, gradient, most_likely, labels_C, settings, words, logits_CV, needs_grad)


def _sparse_(
    teacher: SparseTeacher,
    labels_C: torch.Tensor,
    settings: DistillationConfig,
    words: Words,
    logits_CV: torch.Tensor,
    needs_grad: bool,
) -> tuple[torch.Tensor, ...]:
    student = _student(logits_CV, labels_C.clamp(min=0)[:, None], settings.temperature, words)
    ids_CK, p_CK = teacher.ids_NK, teacher.probabilities_NK
    log_q_CK = words.at(student.log_q_CV, ids_CK)
    cross = -(p_CK * log_q_CK).sum(-1)
    q_CV = student.log_q_CV.exp_()
    if teacher.tail_N is None:
        divergence = cross - teacher.entropy_N
    else:
        # The words that were kept stand on their own, all others are one word of probability q_tail.
        rest_CV = words.put_at_(q_CV, ids_CK, torch.zeros_like(p_CK))
        q_tail = words.total(rest_CV.sum(-1)).clamp(min=1e-30)
        divergence = cross - teacher.tail_N * q_tail.log() + torch.xlogy(p_CK, p_CK).sum(-1)
        divergence += torch.xlogy(teacher.tail_N, teacher.tail_N)
        q_CV = words.put_at_(rest_CV.mul_(1 - teacher.tail_N[:, None] / q_tail[:, None]), ids_CK, log_q_CK.exp())
    gradient = words.add_at_(q_CV, ids_CK, -p_CK)
    return _finish_(
        student, divergence, gradient, teacher.most_likely_N, labels_C, settings, words, logits_CV, needs_grad
    )


def _finish_(
    student: _Student,
    divergence_C: torch.Tensor,
    gradient_CV: torch.Tensor,
    teacher_most_likely_C: torch.Tensor,
    labels_C: torch.Tensor,
    settings: DistillationConfig,
    words: Words,
    logits_CV: torch.Tensor,
    needs_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """Puts α·T·(gradient of the divergence) + (1 - α)·(q - onehot) in the place of the logits; returns the sums."""
    alpha, temperature, is_target = settings.kd_alpha, settings.temperature, labels_C != IGNORED
    kd = temperature**2 * divergence_C
    if needs_grad:
        gradient_CV.mul_(alpha * temperature)
        if alpha != 1:
            gradient_CV.add_(words.softmax(logits_CV)[0], alpha=1 - alpha)
            index = labels_C.clamp(min=0)[:, None]
            words.add_at_(gradient_CV, index, torch.full_like(index, alpha - 1, dtype=torch.float32))
        logits_CV.copy_(gradient_CV.mul_(is_target[:, None]))
    sums = (
        alpha * kd + (1 - alpha) * student.cross_entropy_C,
        kd,
        student.cross_entropy_C,
        student.most_likely_C == labels_C,
        student.most_likely_C == teacher_most_likely_C,
    )
    return tuple((value * is_target).sum() for value in sums)


# ---- divergences: of log p and log q [C, V] (which they may overwrite), per token, and their gradients with respect to
# the student's logits at the temperature

Divergence = tuple[torch.Tensor, torch.Tensor]


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, _beta: float, words: Words) -> Divergence:
    """KL(p‖q) = Σ p (log p - log q); its gradient is q - p."""
    p, q = log_p.exp(), log_q.exp()
    return words.total(torch.linalg.vecdot(p, log_p.sub_(log_q))), q.sub_(p)


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, _beta: float, words: Words) -> Divergence:
    """KL(q‖p) = Σ q (log q - log p)."""
    q, slope = log_q.exp(), log_q - log_p
    divergence = words.total(torch.linalg.vecdot(q, slope))
    return divergence, q.mul_(slope.sub_(divergence[:, None]))


def _jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor, beta: float, words: Words) -> Divergence:
    """β·KL(p‖m) + (1 - β)·KL(q‖m) with m = βp + (1 - β)q (Agarwal et al., arXiv 2306.13649, equation 1)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    slope = log_q - log_m
    own = words.total(torch.linalg.vecdot(q, slope))
    divergence = beta * words.total(torch.linalg.vecdot(p, log_p.sub_(log_m))) + (1 - beta) * own
    return divergence, q.mul_(slope.sub_(own[:, None])).mul_(1 - beta)


DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jensen_shannon": _jensen_shannon}
