"""The chunked loss against the plain one: values, gradients, memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cheaper.losses import chunked
from cheaper.losses.chunked import IGNORED
from cheaper.losses.cross_entropy import linear_cross_entropy
from tests.conftest import REPOSITORY


def inputs(tokens: int, width: int = 16, words: int = 101, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(words, width, generator=generator).requires_grad_()
    labels = torch.randint(words, (tokens,), generator=generator)
    labels[::5] = IGNORED
    return hidden, weight, labels


def plain(hidden, weight, labels):
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return loss, ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_equals_the_plain_loss_with_all_gradients(monkeypatch, tokens, rows):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": rows * 4 * 101})
    monkeypatch.setattr(chunked, "SLICE_BYTES", {"cpu": 2 * 4 * 101})
    monkeypatch.setattr(chunked, "WORDS_AT_ONCE", {"cpu": 40})
    hidden, weight, labels = inputs(tokens)
    expected, expected_correct = plain(hidden, weight, labels)
    expected_grads = torch.autograd.grad(expected * 0.37, [hidden, weight])
    loss, sums = linear_cross_entropy(hidden, weight, labels)
    grads = torch.autograd.grad(loss * 0.37, [hidden, weight])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert sums["accuracy"] == expected_correct
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, weight, labels = inputs(20)
    loss, _ = linear_cross_entropy(hidden * 1e4, weight, labels)
    torch.testing.assert_close(loss, plain(hidden * 1e4, weight, labels)[0], rtol=1e-5, atol=0)
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_nothing_to_learn_gives_zero_loss_and_zero_gradients():
    hidden, weight, labels = inputs(8)
    loss, sums = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert loss == 0
    assert sums["accuracy"] == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    hidden, weight, labels = inputs(12)
    expected = torch.autograd.grad(plain(hidden, weight, labels)[0], [hidden, weight])
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    assert loss.requires_grad == (frozen != "both")
    if frozen == "hidden":
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected[1])
    elif frozen == "weight":
        torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected[0])


def test_gradients_can_be_asked_for_once_only():
    hidden, weight, labels = inputs(12)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    torch.autograd.grad(2 * loss, [hidden, weight], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, [hidden, weight])


def test_no_grad_gives_the_same_loss():
    hidden, weight, labels = inputs(12)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels)[0], plain(hidden, weight, labels)[0])


def test_bf16_autocast_stays_near_fp32_and_grads_keep_their_types():
    hidden, weight, labels = inputs(64, width=64)
    hidden, weight = (hidden.detach() / 8).requires_grad_(), weight
    exact = linear_cross_entropy(hidden, weight, labels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)
    exact_grads, grads = (torch.autograd.grad(value, [hidden, weight]) for value in (exact, loss))
    for ours, theirs in zip(grads, exact_grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 0.02


PEAK = """
import sys, torch
import torch.nn.functional as F
from cheaper.losses.cross_entropy import linear_cross_entropy
from tests.peak_memory import peak, reset_peak
tokens = int(sys.argv[2])
hidden = torch.randn(tokens, 64).requires_grad_()
weight = torch.randn(128256, 64).requires_grad_()
labels = torch.randint(128256, (tokens,))
# The first products set up the library's own buffers.
linear_cross_entropy(hidden[:8], weight, labels[:8])[0].backward()
before = reset_peak()
if sys.argv[1] == "plain":
    F.cross_entropy(hidden @ weight.T, labels).backward()
else:
    linear_cross_entropy(hidden, weight, labels)[0].backward()
print(peak() - before)
"""


def peak(kind: str, tokens: int) -> int:
    """What a loss and its gradients over 128,256 words add to the peak of resident memory, in bytes."""
    command = [sys.executable, "-c", PEAK, kind, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout)


def test_peak_memory_is_below_a_fifth_of_the_plain_loss():
    """8,192 tokens must fit in what the plain loss takes for 1,024: it keeps three tensors of tokens × words, so that
    8,192 take it eight times as much, 12.6 GB, which not every machine has.
    """
    assert peak("chunked", 8192) < peak("plain", 1024)
