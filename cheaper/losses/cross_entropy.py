"""Cross-entropy straight from hidden states: the logits exist one chunk of tokens at a time.

The gradient is computed in the same pass, so that no chunk of logits is computed twice and none is kept. The idea is
that of "Cut Your Losses" (Wijmans et al., arXiv 2411.09009) and of Liger Kernel's fused linear cross-entropy.

Axes are written as suffixes: N tokens, D width, V words.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK_BYTES = 2**28  # of fp32 probabilities at a time


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of ``softmax(hidden · weightᵀ)`` against ``labels``, summed over the targets.

    Matrix products run in autocast's type where autocast is on, the softmax and the sums in fp32; the gradient of
    ``weight`` is summed over chunks in fp32. Where no gradient is wanted, none is computed.

    Args:
        hidden_ND: Floating point.
        weight_VD: Floating point, of the same type outside autocast.
        labels_N: int64, 0 … V-1, or ``IGNORED`` where there is no target.

    Returns:
        The sum of the losses in nats (fp32 scalar, differentiable once), and how many targets are the most likely word
        (int64 scalar).
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N):
        device = hidden_ND.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_ND.dtype
        weight = weight_VD.to(dtype)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        with torch.autocast(device.type, enabled=False):
            for start in range(0, hidden_ND.shape[0], rows):
                chunk = slice(start, start + rows)
                hidden = hidden_ND[chunk].to(dtype)
                logits = hidden @ weight.T
                losses, hits = _logits_to_gradients_(logits, labels_N[chunk], needs_hidden or needs_weight)
                loss += losses
                correct += hits
                if needs_hidden:
                    grad_hidden[chunk] = logits @ weight
                if needs_weight:
                    grad_weight += logits.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype) if needs_weight else None)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        # In place: the weight's gradient is large. Autograd notices if the saved tensors are asked for once more.
        return *(None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors), None


def _logits_to_gradients_(logits: torch.Tensor, labels: torch.Tensor, needs_grad: bool) -> tuple[torch.Tensor, ...]:
    """Returns the sum of losses and the number of hits; puts the gradients in the place of the logits.

    One fused softmax gives everything: where x is the logits and p their softmax, the most likely word k has
    log Σ exp(x) = x_k - log p_k, and the gradient is p - onehot(label), 0 where there is no target.
    """
    is_target = labels != IGNORED
    index = labels.clamp(min=0)[:, None]
    largest, most_likely = logits.max(-1, keepdim=True)
    probabilities = logits.softmax(-1, dtype=torch.float32)
    log_total = largest.float() - probabilities.gather(1, most_likely).log()
    losses = (log_total - logits.gather(1, index).float())[:, 0]
    hits = (most_likely == index)[:, 0] & is_target
    if needs_grad:
        probabilities.scatter_add_(1, index, torch.full_like(log_total, -1))
        logits.copy_(probabilities.mul_(is_target[:, None]))
    return (losses * is_target).sum(), hits.sum()
