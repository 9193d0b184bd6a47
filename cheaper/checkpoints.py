"""Checkpoints: written so that the newest is always whole, read so that a foreign one never runs code.

``step-<n>.pt`` is a whole training state in Composer's format. It is written beside its final name, flushed to the
disk, then renamed.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import composer.utils.checkpoint as composer_checkpoint
import numpy as np
import torch
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from cheaper.config import ExpertsConfig, LatentAttentionConfig, ModelConfig, RopeScalingConfig
from cheaper.distributed.sharding import set_weights
from cheaper.errors import UserError
from cheaper.files import publish
from cheaper.models import hf
from cheaper.models.decoder import Decoder

# What a Composer checkpoint holds besides tensors and plain containers; unpickling these runs no code of the file's.
HARMLESS = [
    datetime.timedelta,
    defaultdict,
    dict,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np.empty(0).__reduce__()[0],  # numpy's array constructor; its module's name differs between numpy versions
]


def safe_load(path: str | Path, map_location: str = "cpu") -> dict[str, Any]:
    """Reads a Composer checkpoint without running any code it may contain.

    Raises:
        UserError: The file is missing, not a checkpoint, cut short, or holds objects outside ``HARMLESS``.
    """
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path}: no such file") from None
    except Exception as error:  # torch raises many kinds for a file that is not what it expects
        reason = "it holds objects other than tensors" if "weights_only" in str(error).lower() else "it is not readable"
        raise UserError(f"checkpoint {path}: refused, {reason} ({' '.join(str(error).split())[:120]})") from None


# Composer 0.32.1 reads checkpoints with an unrestricted unpickler; every load of ours goes through the safe one.
composer_checkpoint._torch_load_with_validation = safe_load


def without_foreign_algorithms(own: Sequence[Algorithm]) -> Callable[[dict[str, Any]], None]:
    """Makes the filter that keeps only a run's ``own`` algorithms in a checkpoint it loads.

    Composer passes the written form of the others to ``eval`` in order to add them to the run.
    """
    names = {type(algorithm).__qualname__ for algorithm in own}

    def keep_own(checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["state"]["algorithms"]
        checkpoint["state"]["algorithms"] = [(name, state) for name, state in saved if name in names]

    return keep_own


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``; unfinished files do not count."""
    return max(Path(folder).glob("step-*.pt"), default=None)


def find_model(path: str, key: str) -> Path:
    """The checkpoint file or ``transformers`` folder that holds the weights at ``path``.

    Args:
        path: A Composer checkpoint, a run folder (its newest checkpoint), a ``transformers`` folder, or a hub id, which
            is downloaded.
        key: Which setting asks, for messages.

    Raises:
        UserError: Nothing is there.
    """
    source = Path(path)
    if source.is_dir() and (newest := newest_checkpoint(source)):
        return newest
    if source.is_file() or (source / "config.json").is_file():
        return source
    if source.exists():
        raise UserError(f"{key} {path}: holds neither step-*.pt nor a transformers model")
    return hf.download(path, key)


def load_weights(decoder: Decoder, path: str) -> None:
    """Fills ``decoder`` with the weights found at ``path``, and takes nothing else from it.

    Raises:
        UserError: Nothing is there, or the weights have other names, shapes or rotary positions than the model.
    """
    source = find_model(path, "training.checkpoint_path")
    if source.is_file():
        checkpoint = safe_load(source)
        weights, config = model_weights(checkpoint), _model_config(_record(checkpoint, source))
    else:
        weights, config = hf.load_weights(source), hf.load_config(source)
    check_shapes(decoder, weights, str(source))
    for key in ("rope_theta", "rope_scaling"):
        trained, ours = getattr(config, key), getattr(decoder.config, key)
        if trained != ours:
            raise UserError(f"checkpoint {source} was trained with model.{key}={trained}, the run has {ours}")
    set_weights(decoder, weights)


def load_decoder(source: Path) -> Decoder:
    """The decoder at ``source``, a result of ``find_model``, in its weights' own type.

    Raises:
        UserError: It is not readable, or another kind of model.
    """
    if not source.is_file():
        return hf.load_pretrained(source)
    checkpoint = safe_load(source)
    with torch.device("meta"):
        decoder = Decoder(_model_config(_record(checkpoint, source)))
    weights = model_weights(checkpoint)
    check_shapes(decoder, weights, str(source))
    decoder.load_state_dict(weights, assign=True)
    return decoder


def model_record(source: Path) -> dict[str, Any]:
    """What the checkpoint file ``source`` says of its model: ``model``, its shape, and the tokenizer's ``vocabulary``.

    Raises:
        UserError: It says nothing.
    """
    return _record(safe_load(source), source)


def _record(checkpoint: dict[str, Any], source: Path) -> dict[str, Any]:
    record = checkpoint["state"]["callbacks"].get(Checkpointer.__name__)
    if not record:
        raise UserError(f"checkpoint {source}: does not say of which model it is; it was not written by this package")
    return record


SECTIONS = {
    "rope_scaling": RopeScalingConfig,
    "latent_attention": LatentAttentionConfig,
    "experts": ExpertsConfig,
}


def _model_config(record: dict[str, Any]) -> ModelConfig:
    shape = dict(record["model"])
    sections = {key: SECTIONS[key](**value) for key, value in shape.items() if isinstance(value, dict)}
    return ModelConfig(**{**shape, **sections})


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The decoder's tensors in a Composer checkpoint, under the decoder's own names."""
    return {name.removeprefix("model."): tensor for name, tensor in checkpoint["state"]["model"].items()}


def check_shapes(decoder: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Raises ``UserError`` naming the first tensor of ``weights`` that does not fit ``decoder``."""
    for name, parameter in decoder.state_dict().items():
        if name not in weights:
            raise UserError(f"checkpoint {source}: has no {name}; it is of another model")
        if weights[name].shape != parameter.shape:
            got, expected = list(weights[name].shape), list(parameter.shape)
            raise UserError(f"checkpoint {source}: {name} is {got}, expected {expected}; it is of another model")
    if extra := set(weights) - set(decoder.state_dict()):
        raise UserError(f"checkpoint {source}: has {sorted(extra)[0]}, which this model lacks; it is of another model")


def check_same_steps(checkpoint: dict[str, Any], rows: int, source: Path) -> None:
    """Raises ``UserError`` if the steps of the run in ``checkpoint`` were not of so many rows over all processes."""
    before = _record(checkpoint, source)["rows_per_step"]
    if before != rows:
        raise UserError(
            f"training.stage: a step has {rows} rows over all processes, the run to resume had {before} ({source}); "
            "batch_size_per_gpu × gradient_accumulation_steps × processes must stay as it was"
        )


class Stopped(Exception):  # noqa: N818  it is no error: the user asked for it
    """Training ended early because a signal asked for it; a checkpoint has been written."""

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; checkpoint {checkpoint}")
        self.signum = signum


class Checkpointer(Callback):
    """Writes a checkpoint every ``interval`` steps, at the end, and when SIGTERM or Ctrl-C asks the run to stop.

    A second Ctrl-C, a second or more after the first, stops at once.

    Args:
        folder: Where ``step-<n>.pt`` go.
        interval: Steps between two checkpoints.
        keep: How many of the newest to keep.
        decoder: Its configuration, as it is when a checkpoint is written, goes into the checkpoint.
        vocabulary: The tokenizer's; goes into the checkpoint too.
        rows_per_step: Of all processes; goes into the checkpoint too.
    """

    def __init__(self, folder: Path, interval: int, keep: int, decoder: Decoder, vocabulary: str, rows_per_step: int):
        self.folder, self.interval, self.keep = folder, interval, keep
        self.decoder, self.vocabulary, self.rows_per_step = decoder, vocabulary, rows_per_step
        self.stop_signal = 0
        self._stopped_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            for partial in self.folder.glob(".partial-*"):  # of a run that was killed while it saved
                partial.unlink()
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[signum] = signal.signal(signum, self._on_signal)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        finished = state.timestamp >= state.max_duration
        signum = _highest_over_ranks(self.stop_signal, state)
        if finished or signum or step % self.interval == 0:
            path = self._save(state, step)
            if signum and not finished:
                raise Stopped(signum, path)

    def state_dict(self) -> dict[str, Any]:
        model = dataclasses.asdict(self.decoder.config)
        return {"model": model, "vocabulary": self.vocabulary, "rows_per_step": self.rows_per_step}

    def close(self, state: State, logger: Logger) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: Any) -> None:
        # Launchers pass Ctrl-C on to processes that the terminal has already told: that is not a second wish.
        if self.stop_signal and signum == signal.SIGINT and time.monotonic() - self._stopped_at > 1:
            os._exit(128 + signum)
        if not self.stop_signal:
            self.stop_signal, self._stopped_at = signum, time.monotonic()

    def _save(self, state: State, step: int) -> Path:
        final = self.folder / f"step-{step:08d}.pt"
        partial = self.folder / f".partial-{final.name}"  # Composer takes anything after ".pt" for a compression
        try:
            composer_checkpoint.save_checkpoint(state, str(partial))
            if dist.get_global_rank() == 0:
                publish(partial, final)
                for old in sorted(self.folder.glob("step-*.pt"))[: -self.keep]:
                    old.unlink()
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:160]
            raise UserError(f"checkpoint {final} could not be written: {reason}; the earlier ones are whole") from error
        return final


def _highest_over_ranks(value: int, state: State) -> int:
    if dist.get_world_size() == 1:
        return value
    tensor = state.device.tensor_to_device(torch.tensor(value))
    dist.all_reduce(tensor, reduce_operation="MAX")
    return int(tensor)
