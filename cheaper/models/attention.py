"""Which attention kernel runs: flash-attn where it is installed and can run, else PyTorch's fused attention."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

HALF = (torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("flash_attn") is not None


def kernel_name(device: torch.device, dtype: torch.dtype, use_flash_attention: bool, within_documents: bool) -> str:
    """``"flash-attn"`` or ``"PyTorch scaled_dot_product_attention"``, whichever ``causal_attention`` takes."""
    if use_flash_attention and INSTALLED and dtype in HALF and device.type == "cuda" and not within_documents:
        return "flash-attn"
    return "PyTorch scaled_dot_product_attention"


def causal_attention(
    q_BTHE: torch.Tensor,
    k_BTKE: torch.Tensor,
    v_BTKE: torch.Tensor,
    mask_B1TT: torch.Tensor | None,
    use_flash_attention: bool,
) -> torch.Tensor:
    """Softmax attention of each token to itself and those before it, scaled by 1/√E.

    Args:
        q_BTHE: Queries, H heads.
        k_BTKE: Keys; each of the K heads serves H/K query heads.
        v_BTKE: Values.
        mask_B1TT: From ``document_mask``, where a token attends only to its own document.
        use_flash_attention: Take flash-attn's kernel where it can run.

    Returns:
        [B, T, H, E].
    """
    causal = mask_B1TT is None
    if kernel_name(q_BTHE.device, q_BTHE.dtype, use_flash_attention, not causal) == "flash-attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q_BTHE, k_BTKE, v_BTKE, causal=True)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    # PyTorch's fused kernels take one key head per query head, but for CUDA's half-precision ones without a mask;
    # asked for groups, the others give way to an unfused one.
    grouped = q.device.type == "cuda" and q.dtype in HALF and causal
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask_B1TT, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def document_mask(document_ids_BT: torch.Tensor) -> torch.Tensor:
    """True where a token may attend: to itself and to those before it of the same document; [B, 1, T, T] bool."""
    return (document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :]).tril()
