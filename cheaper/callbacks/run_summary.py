"""What a run did, in one table at its end and in ``summary.json``."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, get_device

from cheaper.checkpoints import write_atomically
from cheaper.config import RunConfig
from cheaper.losses.distillation import SUMS
from cheaper.models.attention import kernel_name


class RunSummary(LoggerDestination):
    """Says at the start what runs and on what; at the end prints and keeps the figures beside what is expected.

    Args:
        config: The run.
        peak: FLOP/s of one device and where the figure comes from.
    """

    def __init__(self, config: RunConfig, peak: tuple[float, str]):
        self.config, self.peak = config, peak
        self.last: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.last.update(metrics)

    def after_load(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            print(", ".join([*self._setting(state).values(), f"step {int(state.timestamp.batch)}"]), file=sys.stderr)

    def fit_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0 and "train/loss" in self.last:
            summary = self._summary(state)
            path = Path(self.config.training.checkpoint_dir) / "summary.json"
            write_atomically(path, (json.dumps(summary, indent=2) + "\n").encode())
            print(self._table(summary))

    def _setting(self, state: State) -> dict[str, str]:
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
        kernel = kernel_name(
            get_device(None)._device,
            torch.bfloat16 if self.config.training.precision == "bf16" else torch.float32,
            self.config.model.use_flash_attention,
        )
        return {
            "run": self.config.run_name,
            "model": f"{self.config.model.name} with {parameters / 1e6:.1f}M parameters",
            "devices": f"{dist.get_world_size()} × {device}",
            "attention": kernel,
            "precision": self.config.training.precision,
        }

    def _summary(self, state: State) -> dict[str, object]:
        tokens, seconds = int(state.timestamp.token), state.timestamp.total_wct.total_seconds()
        speed, world = tokens / max(seconds, 1e-9), dist.get_world_size()
        return {
            **self._setting(state),
            "torch": torch.__version__,
            "steps": int(state.timestamp.batch),
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_gpu": round(speed / world, 1),
            "mfu": round(self.last["train/mfu"], 4),
            "mfu_peak": f"{self.peak[0] / 1e12:.3g} TFLOP/s per device, {self.peak[1]}",
            "loss": round(self.last["train/loss"], 4),
            "perplexity": round(self.last["train/perplexity"], 3),
            "accuracy": round(self.last["train/accuracy"], 4),
            **{name: round(self.last[f"train/{name}"], 4) for name in SUMS if f"train/{name}" in self.last},
            "mixture": self._mixture(),
        }

    def _mixture(self) -> dict[str, dict[str, float]]:
        streams = {name: stream for name, stream in self.config.data.streams.items() if stream.proportion > 0}
        total = sum(stream.proportion for stream in streams.values())
        return {
            name: {
                "asked": round(stream.proportion / total, 5),
                "consumed": round(self.last[f"data/share/{name}"], 5),
                "tokens": int(self.last[f"data/tokens/{name}"]),
            }
            for name, stream in streams.items()
        }

    def _table(self, summary: dict[str, object]) -> str:
        expected = self.config.training.expected.get(self.config.model.name)
        lines = []
        for name, value in summary.items():
            if name == "mixture":
                continue
            wanted = getattr(expected, name, None)
            lines.append(f"  {name:<26}{value}" + (f"   (expected about {wanted:g})" if wanted is not None else ""))
        for name, share in summary["mixture"].items():
            asked, consumed = f"{share['asked']:.2%}", f"{share['consumed']:.2%}"
            lines.append(f"  {'stream ' + name:<26}{consumed} of the tokens, asked {asked}")
        lines.append(f"  {'everything is in':<26}{self.config.training.checkpoint_dir}")
        return "\n".join(["", *lines])
