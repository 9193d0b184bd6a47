"""What makes DeepSeek-V3 (arXiv 2412.19437) of the decoder: multi-head latent attention and a mixture of experts.

Axes beside the decoder's: N tokens, R rank of a latent, X experts, P experts per token, I width inside an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard

from cheaper.config import ModelConfig
from cheaper.models.attention import causal_attention
from cheaper.models.feed_forward import FeedForward
from cheaper.models.kv_cache import LayerCache
from cheaper.models.rotary import rotate


class LatentAttention(nn.Module):
    """Attention whose queries, keys and values come from latents of low rank (DeepSeek-V2, arXiv 2405.04434, 2.1).

    A head's query and key have a part with rotary positions, in the keys one for all heads, and a part without.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, latent = config, config.latent_attention
        heads = config.num_heads
        self.wq_down = nn.Linear(config.hidden_size, latent.query_rank, bias=False)
        self.query_norm = nn.RMSNorm(latent.query_rank, config.norm_eps)
        self.wq_up = nn.Linear(latent.query_rank, heads * (latent.plain_dim + config.head_dim), bias=False)
        self.wkv_down = nn.Linear(config.hidden_size, latent.key_value_rank + config.head_dim, bias=False)
        self.key_value_norm = nn.RMSNorm(latent.key_value_rank, config.norm_eps)
        self.wkv_up = nn.Linear(latent.key_value_rank, heads * (latent.plain_dim + latent.value_dim), bias=False)
        self.wo = nn.Linear(heads * latent.value_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        document_lengths_BN: torch.Tensor | None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        latent, turned = self.config.latent_attention, self.config.head_dim
        q_BTHE = self.wq_up(self.query_norm(self.wq_down(x_BTD))).unflatten(-1, (-1, latent.plain_dim + turned))
        q_plain, q_turned = q_BTHE.split([latent.plain_dim, turned], -1)
        latent_BTR, k_turned_BTE = self.wkv_down(x_BTD).split([latent.key_value_rank, turned], -1)
        k_plain, v_BTHE = (
            self.wkv_up(self.key_value_norm(latent_BTR))
            .unflatten(-1, (-1, latent.plain_dim + latent.value_dim))
            .split([latent.plain_dim, latent.value_dim], -1)
        )
        k_turned = rotate(_shared(k_turned_BTE)[:, :, None], rotation).to(v_BTHE.dtype)
        k_turned = k_turned.expand(-1, -1, v_BTHE.shape[2], -1)
        q_BTHE = torch.cat([q_plain, rotate(q_turned, rotation).to(q_plain.dtype)], -1)
        k_BTHE = torch.cat([k_plain, k_turned], -1)
        # Attention kernels take values as wide as the keys.
        v_BTHE = F.pad(v_BTHE, (0, k_BTHE.shape[-1] - latent.value_dim))
        flash = self.config.use_flash_attention
        if cache:
            out_BTHE = cache.attention(q_BTHE, k_BTHE, v_BTHE, flash)
        else:
            out_BTHE = causal_attention(q_BTHE, k_BTHE, v_BTHE, document_lengths_BN, flash)
        return self.wo(out_BTHE[..., : latent.value_dim].flatten(-2))


class Router(nn.Module):
    """Chooses experts by sigmoid scores, first the best groups of experts, then the best experts in them.

    A bias per expert takes part in the choice but not in the weights; ``cheaper.algorithms.expert_balancing`` moves it
    so that all experts get as many tokens, without an auxiliary loss (arXiv 2408.15664).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.experts = config.experts
        self.weight = nn.Parameter(torch.empty(self.experts.number, config.hidden_size))
        self.register_buffer("bias", torch.zeros(self.experts.number))
        self.register_buffer("load", torch.zeros(self.experts.number), persistent=False)  # tokens since the last move

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts [N, P] and their weights [N, P], fp32."""
        settings = self.experts
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NX = F.linear(x_ND.float(), _shared(self.weight).float()).sigmoid()
        with torch.no_grad():
            biased_NGX = (scores_NX + self.bias).unflatten(-1, (settings.groups, -1))
            groups_NG = biased_NGX.topk(2, -1).values.sum(-1).topk(settings.groups_kept, -1).indices
            kept_NG = torch.zeros_like(biased_NGX[..., 0], dtype=torch.bool).scatter_(1, groups_NG, True)
            chosen_NP = biased_NGX.masked_fill(~kept_NG[..., None], 0.0).flatten(1).topk(settings.per_token, -1).indices
            if self.training:
                self.load += torch.bincount(chosen_NP.flatten(), minlength=settings.number)
        weights_NP = scores_NX.gather(1, chosen_NP)
        return chosen_NP, settings.scale * weights_NP / (weights_NP.sum(-1, keepdim=True) + 1e-20)


class Experts(nn.Module):
    """A shared network for every token, and for each the few of many small ones that the router chooses.

    Under expert parallelism each process has some experts and sees the tokens of all: it adds what its experts give,
    and the sum over processes is left to each for its own tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        settings, width = config.experts, config.hidden_size
        self.router = Router(config)
        self.gate = nn.Parameter(torch.empty(settings.number, settings.intermediate_size, width))
        self.up = nn.Parameter(torch.empty(settings.number, settings.intermediate_size, width))
        self.down = nn.Parameter(torch.empty(settings.number, width, settings.intermediate_size))
        self.shared = FeedForward(width, settings.shared * settings.intermediate_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_ND = _shared(x_BTD).flatten(0, 1)
        experts_NP, weights_NP = self.router(x_ND)
        # Tokens in the order of their experts, so that each expert's are one block.
        order = experts_NP.flatten().argsort(stable=True)
        counts_X = torch.bincount(experts_NP.flatten(), minlength=len(self.gate))
        networks = (self.gate, self.up, self.down)
        if split := isinstance(self.gate, DTensor):
            networks = [weight.to_local() for weight in networks]
            first = self.gate.device_mesh.get_local_rank() * len(networks[0])
            before, here, _ = counts_X.split([first, len(networks[0]), len(counts_X) - first - len(networks[0])])
            order, counts_X = order[before.sum() :][: here.sum()], here
        tokens = order // experts_NP.shape[1]
        out = self._each_on_its_own(x_ND[tokens], counts_X, *networks)
        out = out * weights_NP.flatten()[order, None]  # in fp32, and so is the sum
        routed = torch.zeros_like(x_ND, dtype=out.dtype).index_add(0, tokens, out).to(x_ND.dtype).view(x_BTD.shape)
        if split:
            routed = DTensor.from_local(routed, self.gate.device_mesh, [Partial()]).redistribute(placements=[Shard(1)])
        return self.shared(x_BTD) + routed

    def _each_on_its_own(
        self, x_MD: torch.Tensor, counts_X: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        """Each expert on its block of tokens, [M, D]."""
        if _grouped(x_MD):
            ends_X = counts_X.cumsum(0).int()

            def product(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                return torch._grouped_mm(a.bfloat16(), weight.bfloat16().transpose(1, 2), offs=ends_X)

            return product(F.silu(product(x_MD, gate)) * product(x_MD, up), down)
        blocks = x_MD.split(counts_X.tolist())
        networks = zip(blocks, gate, up, down, strict=True)
        return torch.cat(
            [F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) for x, gate, up, down in networks]
        )


def _grouped(x: torch.Tensor) -> bool:
    """Whether PyTorch has one product for all experts: in bf16, up to PyTorch 2.9 on Hopper alone."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if kind != "cuda" or dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    return hasattr(F, "grouped_mm") or torch.cuda.get_device_capability(x.device) == (9, 0)


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """What each process has of a tensor that all have whole, where its gradient is the sum of what each makes of it."""
    return tensor.to_local(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor
