"""``metrics.jsonl``: one line of JSON per record of metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from cheaper.files import keep_until

OWN = ("train/", "data/", "system/", "eval/", "time/hours_left", "cost/")


def own_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of this package among those that are logged; Composer puts ``metrics/`` before an evaluator's."""
    named = {name.removeprefix("metrics/"): value for name, value in metrics.items()}
    return {name: float(value) for name, value in named.items() if name.startswith(OWN)}


class MetricsFile(LoggerDestination):
    """Writes ``{"step", "tokens", metric: value, …}`` per record, on rank 0.

    Args:
        path: The file; it is continued if it exists.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pending: dict[str, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            keep_until(self.path, int(state.timestamp.batch))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._pending.update(own_metrics(metrics))

    def batch_end(self, state: State, logger: Logger) -> None:
        self._write(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        self._write(state)

    def _write(self, state: State) -> None:
        if self._pending and dist.get_global_rank() == 0:
            position = {"step": int(state.timestamp.batch), "tokens": int(state.timestamp.token)}
            with open(self.path, "a") as file:
                file.write(json.dumps({**position, **self._pending}) + "\n")
        self._pending = {}
