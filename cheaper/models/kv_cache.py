"""Keys and values of the tokens that a decoder has seen, so that a new token costs one pass over itself alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cheaper.models.attention import causal_attention

GROWTH = 256  # tokens that there is room for at first beside the prompt; then as much again each time


class KeyValueCache:
    """What a decoder keeps of a batch of texts: first of the prompts, in one pass, then of one token of each at a time.

    Prompts are filled up on the right to one length. What is kept of the filling is overwritten token by token as the
    texts grow, and not looked at before.

    Args:
        num_layers: Of the decoder.
        lengths_B: int64, tokens of each prompt.
    """

    def __init__(self, num_layers: int, lengths_B: torch.Tensor):
        self.lengths_B = lengths_B  # once the prompts are kept: lengths before the next pass
        self.longest = 0  # tokens that the longest text may have after the next pass, S; known without asking a device
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    @property
    def has_prompts(self) -> bool:
        """Whether the first pass is over."""
        return self.longest > 0

    def places(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Positions of a pass's tokens in their texts: [T] in the prompts, [B, 1] after them."""
        if self.has_prompts:
            return self.lengths_B[:, None]
        return torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)

    def passed(self, tokens: int) -> None:
        """Says that a pass over so many tokens of each text has gone through all layers."""
        if self.has_prompts:
            self.lengths_B = self.lengths_B + 1
        self.longest += tokens + (not self.has_prompts)


class LayerCache:
    """The part of one layer: keys and values [B, room, K, E]."""

    def __init__(self, cache: KeyValueCache):
        self.cache = cache
        self.keys = self.values = torch.empty(0)

    def attention(self, q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor, flash: bool) -> torch.Tensor:
        """Keeps the pass's keys and values; each query attends to those of its text up to its own; [B, T, H, E]."""
        if not self.cache.has_prompts:
            self.keys, self.values = (_with_room(x, GROWTH) for x in (k_BTKE, v_BTKE))
            return causal_attention(q_BTHE, k_BTKE, v_BTKE, None, flash)
        lengths_B, longest = self.cache.lengths_B, self.cache.longest
        if longest > self.keys.shape[1]:
            self.keys, self.values = (_with_room(x, x.shape[1]) for x in (self.keys, self.values))
        texts_B = torch.arange(len(lengths_B), device=lengths_B.device)
        self.keys[texts_B, lengths_B], self.values[texts_B, lengths_B] = k_BTKE[:, 0], v_BTKE[:, 0]
        k_BKSE, v_BKSE = (x[:, :longest].transpose(1, 2) for x in (self.keys, self.values))
        seen_BS = torch.arange(longest, device=lengths_B.device) <= lengths_B[:, None]
        # The query heads that share a key head are rows of one product: keys are not repeated.
        q_BKRE = q_BTHE[:, 0].unflatten(1, (k_BKSE.shape[1], -1))
        out_BKRE = F.scaled_dot_product_attention(q_BKRE, k_BKSE, v_BKSE, seen_BS[:, None, None])
        return out_BKRE.flatten(1, 2)[:, None]


def _with_room(x_BTKE: torch.Tensor, tokens: int) -> torch.Tensor:
    return F.pad(x_BTKE, (0, 0, 0, 0, 0, tokens))
