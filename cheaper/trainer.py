"""Composer's trainer, without what makes the processor wait for the GPU at the end of every step."""

from __future__ import annotations

import datetime

import torch
from composer import Trainer
from composer.utils import dist

from cheaper.data.shared_memory import release


class UnhurriedTrainer(Trainer):
    """While the device computes a step, the processor prepares the next one.

    Composer reads every step's loss, and sums what ranks say of their batches, on the device. Here the loss is left to
    ``RecipeMetrics``, which reads it where it logs, and what ranks say never leaves the processors. One reading is
    left, at the beginning of a step, when Composer asks how many targets all ranks have.
    """

    def _train_batch(self, use_grad_scaling: bool) -> dict[str, torch.Tensor]:
        super()._train_batch(use_grad_scaling)
        return {}

    def _accumulate_time_across_ranks(
        self, num_samples: int, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        microseconds = batch_time // datetime.timedelta(microseconds=1) if dist.get_global_rank() == 0 else 0
        sums = torch.tensor([num_samples, num_tokens, microseconds])
        dist.all_reduce(sums)
        samples, tokens, microseconds = sums.tolist()
        return samples, tokens, datetime.timedelta(microseconds=microseconds)

    def close(self) -> None:
        super().close()  # after it no process reads any more
        for loader in (self.state.train_dataloader, *(e.dataloader.dataloader for e in self.state.evaluators)):
            release(loader.dataset)
