"""Attention in blocks against PyTorch's own."""

import pytest
import torch

from cheaper.models import block_attention as module
from cheaper.models.attention import fused_attention
from cheaper.models.block_attention import block_attention


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (3, 3)])
def test_equals_pytorch_with_gradients(tokens, heads, key_heads, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 2**17)  # several tiles of key heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, heads, 16), (2, tokens, key_heads, 16), (2, tokens, key_heads, 16)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    ours, theirs = (attention(*inputs) for attention in (block_attention, fused_attention))
    torch.testing.assert_close(ours, theirs)
    # Ours sums the gradients of keys and values in fp32.
    for mine, right in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_values_may_have_other_features_than_keys():
    q, k = torch.randn(2, 1, 40, 2, 8).unbind()
    v = torch.randn(1, 40, 2, 24)
    torch.testing.assert_close(block_attention(q, k, v), fused_attention(q, k, v))
