"""A progress bar over the run's tokens: share done, loss, tokens per second, time left."""

from __future__ import annotations

from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from tqdm import tqdm


class TokenProgressBar(LoggerDestination):
    """Shows the run on standard error of rank 0; on something that is no terminal, a line every 30 seconds.

    Args:
        label: What stands before the bar.
    """

    def __init__(self, label: str):
        self.label = label
        self.bar: tqdm | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            self.bar = tqdm(
                desc=self.label,
                total=int(state.max_duration),
                initial=int(state.timestamp.token),
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.2,
            )
            if not self.bar.fp.isatty():
                self.bar.mininterval = 30

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self.bar is not None and "train/loss" in metrics:
            self.bar.set_postfix(loss=f"{metrics['train/loss']:.3f}", refresh=False)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            # The last step may go past the budget: the bar ends at 100%.
            self.bar.update(min(int(state.timestamp.token), self.bar.total) - self.bar.n)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.close(state, logger)  # what is printed after training goes below the bar

    def close(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
