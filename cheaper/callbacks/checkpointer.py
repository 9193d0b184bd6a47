"""Checkpoints, written so that the newest is always whole: beside its final name, flushed to the disk, then renamed."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import composer.utils.checkpoint as composer_checkpoint
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from cheaper.checkpoints import versions
from cheaper.distributed.shard_files import write_shards
from cheaper.errors import UserError
from cheaper.files import publish, remove
from cheaper.models.decoder import Decoder


class Stopped(Exception):  # noqa: N818  it is no error: the user asked for it
    """Training ended early because a signal asked for it; a checkpoint has been written."""

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; checkpoint {checkpoint}")
        self.signum = signum


class Checkpointer(Callback):
    """Writes a checkpoint every ``interval`` steps, at the end, and when SIGTERM or Ctrl-C asks the run to stop.

    A divided model goes into a folder, its shards while training goes on. A second Ctrl-C, a second or more after the
    first, stops at once.

    Args:
        folder: Where ``step-<n>.pt`` or ``step-<n>/`` go.
        interval: Steps between two checkpoints.
        keep: How many of the newest to keep.
        sharded: Whether the model is divided over the processes.
        decoder: Its configuration, as it is when a checkpoint is written, goes into the checkpoint.
        record: What else a checkpoint says of its run: the tokenizer's ``vocabulary``, ``rows_per_step`` of all
            processes and the ``recipe``.
    """

    def __init__(self, folder: Path, interval: int, keep: int, sharded: bool, decoder: Decoder, record: dict[str, Any]):
        self.folder, self.interval, self.keep = folder, interval, keep
        self.decoder, self.record = decoder, record
        self.stop_signal = 0
        # The writers agree among themselves while the trainer's processes do among theirs.
        self._writers = torch.distributed.new_group(backend="gloo") if sharded else None
        self._under_way: tuple[Future, Path, Path] | None = None
        self._stopped_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            for partial in self.folder.glob(".partial-*"):  # of a run that was killed while it saved
                remove(partial)
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[signum] = signal.signal(signum, self._on_signal)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        finished = state.timestamp >= state.max_duration
        signum = _highest_over_ranks(self.stop_signal)
        if self._under_way and self._under_way[0].done():
            self._publish()
        if finished or signum or step % self.interval == 0:
            path = self._save(state, step)
            if finished or signum:
                self._publish()
            if signum and not finished:
                raise Stopped(signum, path)

    def state_dict(self) -> dict[str, Any]:
        return {**self.record, "model": dataclasses.asdict(self.decoder.config), "versions": versions()}

    def close(self, state: State, logger: Logger) -> None:
        self._publish()
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: Any) -> None:
        # Launchers pass Ctrl-C on to processes that the terminal has already told: that is not a second wish.
        if self.stop_signal and signum == signal.SIGINT and time.monotonic() - self._stopped_at > 1:
            os._exit(128 + signum)
        if not self.stop_signal:
            self.stop_signal, self._stopped_at = signum, time.monotonic()

    def _save(self, state: State, step: int) -> Path:
        self._publish()
        final = self.folder / (f"step-{step:08d}" + ("" if self._writers else ".pt"))
        partial = self.folder / f".partial-{final.name}"  # Composer takes anything after ".pt" for a compression
        try:
            if self._writers:
                self._under_way = write_shards(state, partial, self._writers), partial, final
            else:
                composer_checkpoint.save_checkpoint(state, str(partial))
                self._finish(partial, final)
        except (OSError, RuntimeError) as error:
            raise _not_written(partial, final, error) from error
        return final

    def _publish(self) -> None:
        """Waits for the shards that are being written, if any are."""
        if self._under_way:
            (written, partial, final), self._under_way = self._under_way, None
            try:
                written.result()
                self._finish(partial, final)
            except (OSError, RuntimeError, torch.distributed.checkpoint.CheckpointException) as error:
                raise _not_written(partial, final, error) from error

    def _finish(self, partial: Path, final: Path) -> None:
        if dist.get_global_rank() == 0:
            remove(final)
            publish(partial, final)
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                remove(old)


def _not_written(partial: Path, final: Path, error: Exception) -> UserError:
    if dist.get_global_rank() == 0:
        remove(partial)
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
    return UserError(f"checkpoint {final} could not be written: {reason}; the earlier ones are whole")


def _highest_over_ranks(value: int) -> int:
    tensor = torch.tensor(value)  # on the processors, which need not wait for the device
    dist.all_reduce(tensor, reduce_operation="MAX")
    return int(tensor)
