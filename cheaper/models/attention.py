"""Which attention kernel runs: flash-attn where it is installed and can run, else PyTorch's fused attention."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

INSTALLED = importlib.util.find_spec("flash_attn") is not None


def kernel_name(device: torch.device, dtype: torch.dtype, use_flash_attention: bool, within_documents: bool) -> str:
    """``"flash-attn"`` or ``"PyTorch scaled_dot_product_attention"``, whichever ``causal_attention`` takes."""
    half = dtype in (torch.bfloat16, torch.float16)
    if use_flash_attention and INSTALLED and half and device.type == "cuda" and not within_documents:
        return "flash-attn"
    return "PyTorch scaled_dot_product_attention"


def causal_attention(
    q_BTHE: torch.Tensor,
    k_BTKE: torch.Tensor,
    v_BTKE: torch.Tensor,
    document_ids_BT: torch.Tensor | None,
    use_flash_attention: bool,
) -> torch.Tensor:
    """Softmax attention of each token to itself and those before it, scaled by 1/√E.

    Args:
        q_BTHE: Queries, H heads.
        k_BTKE: Keys; each of the K heads serves H/K query heads.
        v_BTKE: Values.
        document_ids_BT: Where given, a token attends only to tokens of the same document.
        use_flash_attention: Take flash-attn's kernel where it can run.

    Returns:
        [B, T, H, E].
    """
    within_documents = document_ids_BT is not None
    if kernel_name(q_BTHE.device, v_BTKE.dtype, use_flash_attention, within_documents) == "flash-attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q_BTHE, k_BTKE, v_BTKE, causal=True)
    mask_B1TT = _mask(document_ids_BT) if within_documents else None
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    if q.device.type == "cuda":
        out = F.scaled_dot_product_attention(q, k, v, mask_B1TT, is_causal=mask_B1TT is None, enable_gqa=True)
    else:  # the CPU's fused kernel takes one key head per query head
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, mask_B1TT, is_causal=mask_B1TT is None)
    return out.transpose(1, 2)


def _mask(document_ids_BT: torch.Tensor) -> torch.Tensor:
    same_B1TT = (document_ids_BT[:, :, None] == document_ids_BT[:, None, :])[:, None]
    return same_B1TT.tril()
