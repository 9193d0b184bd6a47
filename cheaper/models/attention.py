"""Which attention kernel runs: flash-attn where it is installed and can run, else what is fastest of PyTorch's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from cheaper.models.block_attention import block_attention

HALF = (torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("flash_attn") is not None
PYTORCH_VARLEN = torch.__version__ >= "2.11"  # the first whose varlen_attn has windows


def kernel_name(device: torch.device, dtype: torch.dtype, use_flash_attention: bool) -> str:
    """Which of ``KERNELS`` ``causal_attention`` takes."""
    if use_flash_attention and INSTALLED and dtype in HALF and device.type == "cuda":
        return "flash-attn"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "products of blocks in bf16"
    return "PyTorch scaled_dot_product_attention"


def causal_attention(
    q_BTHE: torch.Tensor,
    k_BTKE: torch.Tensor,
    v_BTKE: torch.Tensor,
    document_lengths_BN: torch.Tensor | None,
    use_flash_attention: bool,
) -> torch.Tensor:
    """Softmax attention of each token to itself and those before it, scaled by 1/√E.

    Args:
        q_BTHE: Queries, H heads.
        k_BTKE: Keys; each of the K heads serves H/K query heads.
        v_BTKE: Values.
        document_lengths_BN: int64, T in all in each row, where a token attends only to its own document.
        use_flash_attention: Take flash-attn's kernel where it can run.

    Returns:
        [B, T, H, E].
    """
    name = kernel_name(q_BTHE.device, q_BTHE.dtype, use_flash_attention)
    if document_lengths_BN is None:
        return KERNELS[name](q_BTHE, k_BTKE, v_BTKE)
    rows = [x.flatten(0, 1) for x in (q_BTHE, k_BTKE, v_BTKE)]
    if varlen := _varlen(name, q_BTHE):
        borders = F.pad(document_lengths_BN.flatten().cumsum(0), (1, 0)).int()
        return varlen(*rows, borders, longest=q_BTHE.shape[1]).view_as(q_BTHE)
    return _each_document(KERNELS[name], rows, document_lengths_BN).view_as(q_BTHE)


def fused_attention(q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor) -> torch.Tensor:
    """PyTorch's fused attention."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    # PyTorch's fused kernels take one key head per query head, but for CUDA's half-precision ones; asked for groups,
    # the others give way to an unfused one.
    grouped = q.device.type == "cuda" and q.dtype in HALF
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


@torch.compiler.disable  # how many calls there are is in the data
def _each_document(
    kernel: Callable[..., torch.Tensor], rows: list[torch.Tensor], document_lengths_BN: torch.Tensor
) -> torch.Tensor:
    """One call per document: memory and time grow with the documents' lengths squared, not with the row's."""
    lengths = [length for length in document_lengths_BN.flatten().tolist() if length]
    documents = zip(*(x[None].split(lengths, dim=1) for x in rows), strict=True)
    return torch.cat([kernel(*document) for document in documents], dim=1)


def _flash(q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor) -> torch.Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q_BTHE, k_BTKE, v_BTKE, causal=True)


def _varlen(name: str, q_BTHE: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """The kernel for documents of many lengths in one call, where there is one."""
    if name == "flash-attn":
        return _flash_varlen
    on_gpu = q_BTHE.device.type == "cuda" and q_BTHE.dtype in HALF
    return _pytorch_varlen if on_gpu and PYTORCH_VARLEN else None


def _flash_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor, longest: int):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, causal=True)


def _pytorch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor, longest: int):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, borders, borders, longest, longest, window_size=(-1, 0))  # which is causal


KERNELS = {
    "flash-attn": _flash,
    "products of blocks in bf16": block_attention,
    "PyTorch scaled_dot_product_attention": fused_attention,
}
