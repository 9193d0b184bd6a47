"""Keys and values of the tokens that a decoder has seen, so that a new token costs one pass over itself alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cheaper.models.attention import causal_attention, fused_attention


class KeyValueCache:
    """What a decoder keeps of a batch of texts: first of the prompts, in one pass, then of one token of each at a time.

    Prompts are filled up on the right to one length. What is kept of the filling is overwritten token by token as the
    texts grow, and not looked at before.

    Args:
        num_layers: Of the decoder.
        lengths_B: int64, tokens of each prompt.
        room: Tokens that a text may come to, S.
    """

    def __init__(self, num_layers: int, lengths_B: torch.Tensor, room: int):
        self.lengths_B, self.room = lengths_B, room  # once the prompts are kept: lengths before the next pass
        self.has_prompts = False
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    def places(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Positions of a pass's tokens in their texts: [T] in the prompts, [B, 1] after them."""
        if self.has_prompts:
            return self.lengths_B[:, None]
        return torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)

    def passed(self) -> None:
        """Says that a pass has gone through all layers."""
        if self.has_prompts:
            self.lengths_B = self.lengths_B + 1
        self.has_prompts = True


class LayerCache:
    """The part of one layer: keys and values [B, S, K, E]."""

    def __init__(self, cache: KeyValueCache):
        self.cache = cache
        self.keys_BSKE = self.values_BSKE = torch.empty(0)

    def attention(self, q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor, flash: bool) -> torch.Tensor:
        """Keeps the pass's keys and values; each query attends to those of its text up to its own; [B, T, H, E]."""
        if not self.cache.has_prompts:
            more = (0, 0, 0, 0, 0, self.cache.room - k_BTKE.shape[1])
            self.keys_BSKE, self.values_BSKE = F.pad(k_BTKE, more), F.pad(v_BTKE, more)
            return causal_attention(q_BTHE, k_BTKE, v_BTKE, None, flash)
        lengths_B = self.cache.lengths_B
        texts_B = torch.arange(len(lengths_B), device=lengths_B.device)
        self.keys_BSKE[texts_B, lengths_B], self.values_BSKE[texts_B, lengths_B] = k_BTKE[:, 0], v_BTKE[:, 0]
        seen_BS = torch.arange(self.cache.room, device=lengths_B.device) <= lengths_B[:, None]
        return fused_attention(q_BTHE, self.keys_BSKE, self.values_BSKE, seen_BS[:, None, None])
