"""The metrics of a recipe under the names that the specification fixes."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from cheaper.algorithms.gradient_clipping import GradientClipping


class RecipeMetrics(Callback):
    """Logs every ``interval`` steps, each figure over the steps since the last record.

    ``train/loss`` is the mean loss per target in nats, as it is optimised; ``train/accuracy`` the share of targets that
    are the most likely word, and whatever else the loss reports is a mean per target too (in distillation
    ``train/kd_loss``, ``train/cross_entropy``, ``train/teacher_agreement``); ``train/perplexity`` exp(cross-entropy);
    ``train/learning_rate`` and ``train/grad_norm`` (before clipping) are those of the last step;
    ``train/tokens_per_second`` counts all devices; ``train/mfu`` is the share of the peak;
    ``data/tokens/<stream>`` counts tokens since the start of the run, ``data/share/<stream>`` their share;
    ``time/hours_left`` and ``cost/left`` extrapolate the record's speed; ``system/gpu_memory`` is the peak in GiB.

    Args:
        streams: Names of the streams, in the order of the batches' ``stream``.
        interval: Steps between two records.
        flops_per_token: Forward and backward, see ``cheaper.flops``.
        peak_flops: FLOP/s of one device.
        clipping: The run's gradient clipping, for the norm.
        data_copies: Devices that see the same rows.
        price_per_gpu_hour: Price of one device for one hour.
    """

    def __init__(
        self,
        streams: list[str],
        interval: int,
        flops_per_token: float,
        peak_flops: float,
        clipping: GradientClipping,
        data_copies: int = 1,
        price_per_gpu_hour: float | None = None,
    ):
        self.streams, self.interval = streams, interval
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.clipping, self.data_copies, self.price_per_gpu_hour = clipping, data_copies, price_per_gpu_hour
        self.stream_tokens = torch.zeros(len(streams), dtype=torch.int64)  # all ranks, up to the last record
        self._new_stream_tokens = torch.zeros_like(self.stream_tokens)  # this rank, since then
        self._sums: dict[str, torch.Tensor] = {}  # over this rank's targets since the last record, and their number
        self._device = torch.device("cpu")
        self._learning_rate = 0.0
        self._clock = (0.0, 0)  # seconds and tokens at the last record

    def fit_start(self, state: State, logger: Logger) -> None:
        self._device = state.device._device
        self._sums = {name: value.to(self._device) for name, value in self._sums.items()}
        self._clock = (time.perf_counter(), int(state.timestamp.token))

    def batch_start(self, state: State, logger: Logger) -> None:
        self._learning_rate = state.schedulers[0].get_last_lr()[0]
        for stream, tokens in zip(state.batch["stream"], state.batch["row_tokens"], strict=True):
            self._new_stream_tokens[stream] += tokens

    def after_forward(self, state: State, logger: Logger) -> None:
        out = state.outputs
        # Stays on the device: reading it here would make the device wait in every micro-batch.
        for name, value in {"targets": out.num_targets, "loss": out.loss_sum, **out.sums}.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()

    def batch_end(self, state: State, logger: Logger) -> None:
        finished = state.timestamp >= state.max_duration
        if int(state.timestamp.batch) % self.interval == 0 or finished:
            logger.log_metrics(self._record(state))

    def _record(self, state: State) -> dict[str, float]:
        means = self._summed_over_ranks()
        self._sums = {}
        self._add_stream_tokens()
        targets = max(means.pop("targets"), 1)
        means = {name: value / targets for name, value in means.items()}
        now, tokens = time.perf_counter(), int(state.timestamp.token)
        speed = (tokens - self._clock[1]) / (now - self._clock[0])
        self._clock = (now, tokens)
        hours_left = max(0, int(state.max_duration) - tokens) / speed / 3600
        record = {
            **{f"train/{name}": value for name, value in means.items()},
            "train/perplexity": math.exp(min(means.get("cross_entropy", means["loss"]), 700)),
            "train/learning_rate": self._learning_rate,
            "train/grad_norm": float(self.clipping.norm),
            "train/tokens_per_second": speed,
            "train/mfu": speed * self.flops_per_token / (self.peak_flops * dist.get_world_size()),
            "time/hours_left": hours_left,
        }
        if self.price_per_gpu_hour is not None:
            record["cost/left"] = hours_left * dist.get_world_size() * self.price_per_gpu_hour
        if torch.cuda.is_available():
            record["system/gpu_memory"] = torch.cuda.max_memory_allocated() / 2**30
        total = max(int(self.stream_tokens.sum()), 1)
        for name, count in zip(self.streams, self.stream_tokens.tolist(), strict=True):
            record[f"data/tokens/{name}"] = count
            record[f"data/share/{name}"] = count / total
        return record

    def _summed_over_ranks(self) -> dict[str, float]:
        values = torch.stack(list(self._sums.values()))
        dist.all_reduce(values)
        return dict(zip(self._sums, (values / self.data_copies).tolist(), strict=True))

    def _new_tokens_over_ranks(self) -> torch.Tensor:
        counts = self._new_stream_tokens.to(self._device, copy=True)
        dist.all_reduce(counts)
        return counts.cpu() // self.data_copies

    def _add_stream_tokens(self) -> None:
        self.stream_tokens += self._new_tokens_over_ranks()
        self._new_stream_tokens.zero_()

    def state_dict(self) -> dict[str, Any]:
        # Rank 0 writes the checkpoint, and this is called on every rank: sum over ranks what it must remember.
        tokens = self.stream_tokens + self._new_tokens_over_ranks()
        sums = self._summed_over_ranks() if self._sums else {}
        return {"sums": sums, "stream_tokens": tokens, "streams": self.streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream_tokens = state["stream_tokens"]
        mine = self.data_copies * float(dist.get_global_rank() == 0)
        self._sums = {name: torch.tensor(value * mine, dtype=torch.float64) for name, value in state["sums"].items()}
