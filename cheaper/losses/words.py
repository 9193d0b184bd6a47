"""The vocabulary over processes: which words a process has, and what needs all of them.

Under tensor parallelism each process has some rows of the output matrix, so its logits are those of some words. What a
loss makes of whole rows of logits is put together here from the parts; with the vocabulary in one process every method
is the plain operation. Nothing here is differentiable: the losses compute their gradients themselves.

Axes are written as suffixes: C tokens, V words of this process, K words of a token, by their ids in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Words:
    """The words of this process.

    Args:
        first: Id of the first.
        number: How many.
        most: How many the process with the most of them has: all choose the size of a chunk by it.
        group: The processes that have the vocabulary together; ``None`` where this one has all.
    """

    first: int
    number: int
    most: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, weight_VD: torch.Tensor, limit: int | None = None) -> Words:
        """The words whose rows of an output matrix this process has, of the first ``limit`` words."""
        limit = weight_VD.shape[0] if limit is None else limit
        if not isinstance(weight_VD, DTensor):
            return cls.all(limit)
        mesh, (placement,) = weight_VD.device_mesh, weight_VD.placements
        if placement != Shard(0):
            raise ValueError(f"the output matrix is placed as {placement}, expected Shard(0)")
        shape, offset = compute_local_shape_and_global_offset(weight_VD.shape, mesh, weight_VD.placements)
        most = -(-weight_VD.shape[0] // mesh.size())
        return cls(offset[0], max(0, min(shape[0], limit - offset[0])), most, mesh.get_group())

    @classmethod
    def all(cls, number: int) -> Words:
        """The whole vocabulary in this process."""
        return cls(0, number, number)

    def rows(self, weight_VD: torch.Tensor) -> torch.Tensor:
        """Their rows of ``weight_VD``, the output matrix of this model or of another of the same vocabulary."""
        if isinstance(weight_VD, DTensor):
            if Words.of(weight_VD).most == self.most:  # both are cut at the same words
                return weight_VD.to_local()[: self.number]
            weight_VD = weight_VD.redistribute(placements=[Replicate()]).to_local()
        if self.number == len(weight_VD):
            return weight_VD  # a slice of all its rows would have its gradient copied into one of zeros
        return weight_VD[self.first : self.first + self.number]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of every process's ``values``, which may be overwritten."""
        if self.group:
            values = values.contiguous()
            dist.all_reduce(values, group=self.group)
        return values

    def softmax(self, logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The softmax over all words, the logarithm of its denominator [C, 1], both fp32, and the most likely [C, 1].

        One fused softmax gives everything: where x is the logits and p their softmax, the largest x_k has
        log Σ exp(x) = x_k - log p_k.
        """
        largest_C1, most_likely_C1 = logits_CV.max(-1, keepdim=True)
        largest_C1, p_CV = largest_C1.float(), logits_CV.softmax(-1, dtype=torch.float32)
        log_total_C1 = largest_C1 - p_CV.gather(1, most_likely_C1).log()
        if not self.group:
            return p_CV, log_total_C1, most_likely_C1
        whole_C1 = self._gathered(log_total_C1).logsumexp(0)
        return p_CV.mul_((log_total_C1 - whole_C1).exp_()), whole_C1, self._best(largest_C1, most_likely_C1)

    def log_softmax(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """The log-softmax over all words, fp32."""
        log_p_CV = logits_CV.log_softmax(-1, dtype=torch.float32)
        if self.group:
            log_total_C1 = logits_CV.amax(-1, keepdim=True).float() - log_p_CV.amax(-1, keepdim=True)
            log_p_CV.add_(log_total_C1 - self._gathered(log_total_C1).logsumexp(0))
        return log_p_CV

    def most_likely(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """Ids [C] of the words with the largest logits."""
        if not self.group:
            return logits_CV.argmax(-1)
        largest_C1, index_C1 = logits_CV.max(-1, keepdim=True)
        return self._best(largest_C1.float(), index_C1)[:, 0]

    def top(self, values_CV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``k`` largest values of each token, in falling order, and their ids; fewer where there are no more."""
        if not self.group:
            return values_CV.topk(min(k, values_CV.shape[-1]), dim=-1)
        values, ids = values_CV.topk(min(k, values_CV.shape[-1]), dim=-1)
        missing = (0, min(k, self.most) - values.shape[1])  # of a process with fewer words than the others
        values = self._gathered(torch.nn.functional.pad(values, missing, value=float("-inf"))).movedim(0, 1).flatten(1)
        ids = self._gathered(torch.nn.functional.pad(ids + self.first, missing)).movedim(0, 1).flatten(1)
        values, best = values.topk(min(k, int((values[0] > float("-inf")).sum())), dim=-1)
        return values, ids.gather(1, best)

    def at(self, values_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
        """The values of some words [C, K], whoever has them; fp32."""
        if not self.group:
            return values_CV.gather(1, ids_CK).float()
        here_CK, index_CK = self._here(ids_CK)
        return self.total(values_CV.gather(1, index_CK).float().mul_(here_CK))

    def add_at_(self, values_CV: torch.Tensor, ids_CK: torch.Tensor, amounts_CK: torch.Tensor) -> torch.Tensor:
        """Adds to the values of those words that are here; ids may repeat."""
        if self.group:
            here_CK, ids_CK = self._here(ids_CK)
            amounts_CK = amounts_CK * here_CK
        return values_CV.scatter_add_(1, ids_CK, amounts_CK)

    def put_at_(self, values_CV: torch.Tensor, ids_CK: torch.Tensor, amounts_CK: torch.Tensor) -> torch.Tensor:
        """Sets the values of those words that are here."""
        if not self.group:
            return values_CV.scatter_(1, ids_CK, amounts_CK)
        here_CK, index_CK = self._here(ids_CK)
        tokens = torch.arange(len(ids_CK), device=ids_CK.device)[:, None].expand_as(ids_CK)
        values_CV[tokens[here_CK], index_CK[here_CK]] = amounts_CK[here_CK]
        return values_CV

    def _here(self, ids_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which ids are this process's words, and their columns, of the others any."""
        index_CK = ids_CK - self.first
        return (index_CK >= 0) & (index_CK < self.number), index_CK.clamp(0, self.number - 1)

    def _best(self, largest_C1: torch.Tensor, index_C1: torch.Tensor) -> torch.Tensor:
        _, process = self._gathered(largest_C1).max(0, keepdim=True)
        return self._gathered(index_C1 + self.first).gather(0, process)[0]

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Every process's ``values``, stacked in front."""
        parts = values.new_empty(dist.get_world_size(self.group) * values.numel())
        dist.all_gather_into_tensor(parts, values.flatten(), group=self.group)
        return parts.view(-1, *values.shape)
