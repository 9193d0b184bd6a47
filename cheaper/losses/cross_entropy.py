"""Cross-entropy straight from hidden states: the logits exist one chunk of tokens at a time.

The gradient is computed in the same pass, so that no chunk of logits is computed twice and none is kept. The idea is
that of "Cut Your Losses" (Wijmans et al., arXiv 2411.09009) and of Liger Kernel's fused linear cross-entropy.
"""

from __future__ import annotations

import torch

IGNORED = -100
CHUNK_BYTES = 2**28  # of fp32 logits at a time


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of ``softmax(hidden · weightᵀ)`` against ``labels``, summed over the targets.

    Matrix products run in autocast's type where autocast is on, the softmax and the sums in fp32.

    Args:
        hidden_ND: [N tokens, D features].
        weight_VD: [V words, D features].
        labels_N: [N] int64, ``IGNORED`` where there is no target.

    Returns:
        The sum of the losses in nats (fp32 scalar, differentiable), and how many targets are the most likely word
        (int64 scalar).
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N):
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
        weight = weight_VD.to(dtype)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden_ND), rows):
                chunk = slice(start, start + rows)
                hidden, labels = hidden_ND[chunk].to(dtype), labels_N[chunk]
                is_target = labels != IGNORED
                index = labels.clamp(min=0)[:, None]
                logits = (hidden @ weight.T).float()
                largest, most_likely = logits.max(-1)
                correct += ((most_likely == labels) & is_target).sum()
                # softmax(x) = exp(x - max) / Σ exp(x - max), in the place of the logits
                target_logit = logits.gather(1, index)[:, 0]
                probabilities = logits.sub_(largest[:, None]).exp_()
                total = probabilities.sum(-1)
                loss += ((total.log() + largest - target_logit) * is_target).sum()
                if not (needs_hidden or needs_weight):
                    continue
                # ∂loss/∂logits = softmax(logits) - onehot(label), 0 where there is no target
                grad_logits = probabilities.mul_((is_target / total)[:, None])
                grad_logits.scatter_add_(1, index, -is_target.float()[:, None])
                grad_logits = grad_logits.to(dtype)
                if needs_hidden:
                    grad_hidden[chunk] = grad_logits @ weight
                if needs_weight:
                    grad_weight += grad_logits.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype) if needs_weight else None)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_loss.to(grad_weight.dtype),
            None,
        )
