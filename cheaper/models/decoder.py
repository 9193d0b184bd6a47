"""The decoder of MobileLLM-R1 (arXiv 2509.24945), the shape of Llama 4's text model without experts.

- Pre-norm blocks: RMSNorm, attention, RMSNorm, SwiGLU; no biases, no dropout.
- Grouped-query attention; rotary positions on every layer, features (2i, 2i+1) turned together.
- Queries and keys are RMS-normalised without weights, after the rotation (``qk_norm``).
- The output matrix is the embedding (``tie_word_embeddings``) or a matrix of its own.
- The largest has DeepSeek-V3's attention and experts in their places, see ``cheaper.models.moe``.
- The loss is computed inside ``forward``, from hidden states in chunks: no tensor of tokens × words is ever kept.

Axes are written as suffixes: B rows, T tokens, D width, H query heads, K key heads, E features per head, V words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from cheaper.config import ModelConfig
from cheaper.losses.chunked import IGNORED
from cheaper.losses.cross_entropy import linear_cross_entropy
from cheaper.models.attention import causal_attention
from cheaper.models.feed_forward import FeedForward
from cheaper.models.kv_cache import KeyValueCache, LayerCache
from cheaper.models.moe import Experts, LatentAttention, Router
from cheaper.models.rotary import rotary_rotation, rotate

# From hidden states [N, D], the output matrix [V, D] and labels [N] to the loss and other figures, summed over targets.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class LossOutput(NamedTuple):
    """What a pass with labels returns: scalars on the model's device, which nothing has waited for yet."""

    loss_sum: torch.Tensor  # fp32, nats, summed over the targets; differentiable
    num_targets: torch.Tensor  # int64
    sums: dict[str, torch.Tensor]  # other figures, summed over the targets: "accuracy", and what else the loss reports


class Decoder(nn.Module):
    """A causal language model from token ids to logits or to the loss.

    Args:
        config: The shape. The decoder keeps a copy, whose ``rope_theta`` is read in every pass and may be raised later.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        config = self.config = dataclasses.replace(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        # A tied model has no module here: a parameter that two modules share comes apart in ``to_empty``.
        tied = config.tie_word_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    @property
    def output_weight(self) -> torch.Tensor:
        """The output matrix [V, D]: the head's, or the embedding's where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def device(self) -> torch.device:
        """Where it computes; shards may be kept in the processor's memory."""
        weight = self.output_weight
        if isinstance(weight, DTensor) and weight.device_mesh.device_type != weight.device.type:
            return torch.device(weight.device_mesh.device_type, torch.cuda.current_device())
        return weight.device

    def init_weights(self) -> None:
        """Normal(0, ``initializer_std``) for every matrix, norms at 1.

        The two matrices of a block that write into the residual stream start smaller by √(2 · layers), so that the
        stream's variance does not grow with depth (GPT-2, section 2.3; Llama's followers, OLMo among them, keep it).
        """
        for module in self.modules():
            self.param_init_fn(module)

    def param_init_fn(self, module: nn.Module) -> None:
        """Initialises what ``module`` itself owns."""
        std = self.config.initializer_std
        written_std = std / math.sqrt(2 * self.config.num_layers)
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=written_std if module in self._writers() else std)
        elif isinstance(module, Experts):
            for weight in (module.gate, module.up):
                nn.init.normal_(weight, std=std)
            nn.init.normal_(module.down, std=written_std)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
            nn.init.zeros_(module.load)

    def _writers(self) -> set[nn.Module]:
        """The matrices whose products are added to the residual stream."""
        networks = [block.feed_forward for block in self.blocks]
        dense = [network.shared if isinstance(network, Experts) else network for network in networks]
        return {*(block.attention.wo for block in self.blocks), *(network.down for network in dense)}

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor | None = None,
        document_lengths_BN: torch.Tensor | None = None,
        loss: Loss = linear_cross_entropy,
    ) -> torch.Tensor | LossOutput:
        """Logits, or with labels the loss.

        Args:
            input_ids_BT: int64 token ids.
            labels_BT: int64 ids, ``IGNORED`` where there is no target, *not* shifted: position t is predicted from the
                tokens before t. The shift happens in ``predictors`` and ``targets`` only.
            document_lengths_BN: int64, the lengths of each row's documents in order, filled up with zeros, T in all.
                Where given, attention and positions stay inside documents. The labels alone say what is a target:
                whoever makes document lengths sets the label of each document's first token to ``IGNORED``, for nothing
                that it may see tells it. Without them a document's end predicts the next one's start, as in the paper.
            loss: What is made of hidden states, output matrix and targets.

        Returns:
            Logits [B, T, V] without labels, else a ``LossOutput``.
        """
        hidden_BTD = self.hidden(input_ids_BT, document_lengths_BN)
        if labels_BT is None:
            return F.linear(hidden_BTD, whole(self.output_weight))
        loss_sum, sums = loss(predictors(hidden_BTD), self.output_weight, targets(labels_BT))
        return LossOutput(loss_sum, count_targets(labels_BT), sums)

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        document_lengths_BN: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the last norm.

        Args:
            input_ids_BT: int64 token ids.
            document_lengths_BN: As for ``forward``.
            cache: Where the tokens before these are kept, and these shall be.
        """
        x_BTD = self.embedding(input_ids_BT)
        positions = cache.places(input_ids_BT) if cache else row_positions(input_ids_BT, document_lengths_BN)
        rotation = rotary_rotation(positions, self.config)
        for block, layer in zip(self.blocks, cache.layers if cache else [None] * len(self.blocks), strict=True):
            x_BTD = block(x_BTD, rotation, document_lengths_BN, layer)
        if cache:
            cache.passed(input_ids_BT.shape[1])
        return whole(self.norm(x_BTD))

    def next_token_logits(self, input_ids_BT: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Logits [B, V] of the token after each text.

        Args:
            input_ids_BT: The prompts, filled up on the right to one length; after them the newest token of each text.
            cache: What has been kept of the texts.
        """
        ends_B = 0 if cache.has_prompts else cache.lengths_B - 1
        hidden_BTD = self.hidden(input_ids_BT, cache=cache)
        last_BD = hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), ends_B]
        return F.linear(last_BD, whole(self.output_weight))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process has a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def predictors(x_BTD: torch.Tensor) -> torch.Tensor:
    """What predicts the ``targets``, token by token: all but the last of each row; [B · (T - 1), …]."""
    return x_BTD[:, :-1].flatten(0, 1)


def targets(labels_BT: torch.Tensor) -> torch.Tensor:
    """What is predicted: all but the first of each row; [B · (T - 1)]."""
    return labels_BT[:, 1:].flatten()


def count_targets(labels_BT: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """How many tokens the loss of ``labels`` [B, T] is summed over, in all or along ``dim``; int64."""
    return (labels_BT[:, 1:] != IGNORED).sum(dim)


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = LatentAttention(config) if config.latent_attention else Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        sparse = config.experts is not None and layer >= config.experts.dense_layers
        self.feed_forward = Experts(config) if sparse else FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        document_lengths_BN: torch.Tensor | None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(cast_once(self.attention_norm(x_BTD)), rotation, document_lengths_BN, cache)
        return x_BTD + self.feed_forward(cast_once(self.feed_forward_norm(x_BTD)))


def cast_once(x_BTD: torch.Tensor) -> torch.Tensor:
    """In autocast's type where it is on: else each matrix that ``x`` meets would make and keep a copy of its own."""
    device = x_BTD.device.type
    return x_BTD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_BTD


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.wq = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        document_lengths_BN: torch.Tensor | None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        E = self.config.head_dim
        q_BTHE = rotate(self.wq(x_BTD).unflatten(-1, (-1, E)), rotation)
        k_BTKE = rotate(self.wk(x_BTD).unflatten(-1, (-1, E)), rotation)
        v_BTKE = self.wv(x_BTD).unflatten(-1, (-1, E))
        if self.config.qk_norm:
            q_BTHE = F.rms_norm(q_BTHE, (E,), eps=self.config.norm_eps)
            k_BTKE = F.rms_norm(k_BTKE, (E,), eps=self.config.norm_eps)
        q_BTHE, k_BTKE = q_BTHE.to(v_BTKE.dtype), k_BTKE.to(v_BTKE.dtype)
        flash = self.config.use_flash_attention
        if cache:
            out_BTHE = cache.attention(q_BTHE, k_BTKE, v_BTKE, flash)
        else:
            out_BTHE = causal_attention(q_BTHE, k_BTKE, v_BTKE, document_lengths_BN, flash)
        return self.wo(out_BTHE.flatten(-2))


def row_positions(input_ids_BT: torch.Tensor, document_lengths_BN: torch.Tensor | None) -> torch.Tensor:
    """Positions from 0: [T], or [B, T] that start again at each document."""
    positions_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    if document_lengths_BN is None:
        return positions_T
    starts_BN = document_lengths_BN.cumsum(-1) - document_lengths_BN
    starts = starts_BN.flatten().repeat_interleave(document_lengths_BN.flatten(), output_size=input_ids_BT.numel())
    return positions_T - starts.view_as(input_ids_BT)
