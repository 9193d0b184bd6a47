"""What is computed again in the backward pass, counted operator by operator."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cheaper.distributed.activation_checkpointing import checkpoint_activations
from cheaper.models import attention
from cheaper.models.decoder import Decoder
from tests.numerics.test_llama4_parity import small

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"
FLASH = "flash_attn::_flash_attn_forward"


class Counted(TorchDispatchMode):
    """Counts the calls of one operator."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.name() == self.name
        return function(*args, **(kwargs or {}))


def calls(mode: str, operator: str) -> float:
    """Of ``operator`` in a step, for each block."""
    torch.manual_seed(0)
    decoder = Decoder(small())
    checkpoint_activations(decoder, mode)
    with Counted(operator) as counted:
        decoder(torch.randint(0, decoder.config.vocab_size, (2, 16))).sum().backward()
    return counted.calls / len(decoder.blocks)


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_pytorchs_attention(mode, times):
    assert calls(mode, FUSED) == times


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_flash_attn(monkeypatch, mode, times):
    """An operator of flash-attn's name on a CPU: its own needs a GPU."""
    with torch.library._scoped_library("flash_attn", "DEF"):

        @torch.library.custom_op(FLASH, mutates_args=())
        def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention.fused_attention(q, k, v).clone()

        def gradients(ctx, grad):
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(attention.fused_attention(*inputs), inputs, grad)

        flash.register_autograd(gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
        monkeypatch.setitem(attention.KERNELS, "PyTorch scaled_dot_product_attention", flash)
        assert calls(mode, FLASH) == times
