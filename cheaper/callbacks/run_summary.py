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

from cheaper.callbacks.metrics_file import own_metrics
from cheaper.config import RunConfig, TrainingConfig, parse_target
from cheaper.files import write_atomically
from cheaper.losses.distillation import SUMS
from cheaper.models.attention import kernel_name
from cheaper.precision import compute_dtype, describe


class RunSummary(LoggerDestination):
    """Says at the start what runs and on what; at the end prints and keeps the figures beside what is expected.

    Args:
        config: The run.
        peak: FLOP/s of one device and where the figure comes from.
        shares: Of the tokens, asked of each stream.
        allocator: Which has the processor's memory.
    """

    def __init__(self, config: RunConfig, peak: tuple[float, str], shares: dict[str, float], allocator: str):
        self.config, self.peak, self.shares, self.allocator = config, peak, shares, allocator
        self.last: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.last.update(own_metrics(metrics))

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
            compute_dtype(self.config),
            self.config.model.use_flash_attention,
        )
        return {
            "run": self.config.run_name,
            "model": f"{self.config.model.name} with {parameters / 1e6:.1f}M parameters",
            "devices": f"{dist.get_world_size()} × {device}",
            "attention": kernel,
            "precision": describe(self.config),
            "blocks": _describe_blocks(self.config.training),
            "allocator": self.allocator,
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
            "held_out": {name: value for name, value in self.last.items() if name.startswith("eval/")},
            "targets": [self._check(target) for target in self.config.training.targets],
            "mixture": self._mixture(),
        }

    def _check(self, target: str) -> dict[str, object]:
        name, comparison, bound = parse_target(target)
        value = self.last.get(name)
        met = value is not None and (value < bound if comparison == "<" else value > bound)
        return {"target": target, "value": value, "met": met}

    def _mixture(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "asked": round(share, 5),
                "consumed": round(self.last[f"data/share/{name}"], 5),
                "tokens": int(self.last[f"data/tokens/{name}"]),
            }
            for name, share in self.shares.items()
        }

    def _table(self, summary: dict[str, object]) -> str:
        expected = self.config.training.expected.get(self.config.model.name)
        lines = []
        for name, value in summary.items():
            if isinstance(value, (dict, list)):
                continue
            wanted = getattr(expected, name, None)
            lines.append(f"  {name:<32}{value}" + (f"   (expected about {wanted:g})" if wanted is not None else ""))
        lines += [f"  {name.removeprefix('eval/'):<32}{value:.4f}" for name, value in summary["held_out"].items()]
        for target in summary["targets"]:
            value = "not measured" if target["value"] is None else f"{target['value']:.4g}"
            lines.append(f"  {'target ' + ('met' if target['met'] else 'MISSED'):<32}{target['target']} (is {value})")
        for name, share in summary["mixture"].items():
            asked, consumed = f"{share['asked']:.2%}", f"{share['consumed']:.2%}"
            lines.append(f"  {'stream ' + name:<32}{consumed} of the tokens, asked {asked}")
        lines.append(f"  {'everything is in':<32}{self.config.training.checkpoint_dir}")
        return "\n".join(["", *lines])


def _describe_blocks(training: TrainingConfig) -> str:
    return ("compiled" if training.compile else "as written") + (", products in fp8" if training.fp8 else "")
