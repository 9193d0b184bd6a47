"""Checkpoints are read so that a foreign one never runs code.

``step-<n>.pt`` is a whole training state in Composer's format; ``step-<n>/`` one of a model divided over devices, see
``cheaper.distributed.shard_files``. ``cheaper.callbacks.checkpointer`` writes them.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import composer.utils.checkpoint as composer_checkpoint
import numpy as np
import torch
from composer.core import Algorithm
from composer.utils import dist
from torch import nn

import cheaper
from cheaper.compose import leaves
from cheaper.config import ExpertsConfig, LatentAttentionConfig, ModelConfig, RopeScalingConfig
from cheaper.distributed.shard_files import OPTIMIZER, RUN, fill_from_shards, is_shards, weights_in, whole_tensors
from cheaper.distributed.sharding import set_weights
from cheaper.errors import UserError
from cheaper.files import newest_checkpoint, publish
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


def find_model(path: str, key: str) -> Path:
    """The checkpoint or ``transformers`` folder that holds the weights at ``path``.

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
    if is_checkpoint(source) or (source / "config.json").is_file():
        return source
    if source.exists():
        raise UserError(f"{key} {path}: holds neither a checkpoint step-* nor a transformers model")
    return hf.download(path, key)


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint of ours, in one file or in shards."""
    return path.is_file() or is_shards(path)


def load_weights(decoder: Decoder, path: str) -> None:
    """Fills ``decoder`` with the weights found at ``path``, and takes nothing else from it.

    Raises:
        UserError: Nothing is there, or the weights have other names, shapes or rotary positions than the model.
    """
    source = find_model(path, "training.checkpoint_path")
    if is_checkpoint(source):
        weights, config = load_model_weights(source), model_shape(source)
    else:
        weights, config = hf.load_weights(source), hf.load_config(source)
    check_shapes(decoder, weights, str(source))
    trained, ours = _computed_with(config), _computed_with(decoder.config)
    for key in ours:
        if trained.get(key) != ours[key]:
            raise UserError(
                f"checkpoint {source} was trained with model.{key}={trained.get(key)}, the run has {ours[key]}"
            )
    if is_shards(source):
        fill_from_shards(decoder.state_dict(), source)
    else:
        set_weights(decoder, weights)


# Of a model's configuration what its logits do not depend on.
WITHOUT_EFFECT = (
    "name",
    "max_position_embeddings",
    "initializer_std",
    "use_flash_attention",
    "experts.balancing_speed",
)


def _computed_with(config: ModelConfig) -> dict[str, Any]:
    """What decides the logits of a model besides its weights, under the dotted keys of ``model``."""
    return {key: value for key, value in leaves(dataclasses.asdict(config)) if key not in WITHOUT_EFFECT}


def load_decoder(source: Path) -> Decoder:
    """The decoder at ``source``, a result of ``find_model``, in its weights' own type.

    Raises:
        UserError: It is not readable, or another kind of model.
    """
    if not is_checkpoint(source):
        return hf.load_pretrained(source)
    with torch.device("meta"):
        decoder = Decoder(model_shape(source))
    weights = load_model_weights(source)
    check_shapes(decoder, weights, str(source))
    if is_shards(source):
        weights = {name: torch.empty_like(tensor, device="cpu") for name, tensor in weights.items()}
        fill_from_shards(weights, source)
    decoder.load_state_dict(weights, assign=True)
    return decoder


def model_record(source: Path) -> dict[str, Any]:
    """What the checkpoint ``source`` says of its run, see ``cheaper.callbacks.checkpointer``.

    Raises:
        UserError: It says nothing.
    """
    record = safe_load(run_file(source))["state"]["callbacks"].get("Checkpointer")
    if not record:
        raise UserError(f"checkpoint {source}: does not say of which model it is; it was not written by this package")
    return record


SECTIONS = {
    "rope_scaling": RopeScalingConfig,
    "latent_attention": LatentAttentionConfig,
    "experts": ExpertsConfig,
}


def model_shape(source: Path) -> ModelConfig:
    """The configuration of the model in the checkpoint ``source``."""
    record = model_record(source)
    shape = record["model"]
    try:
        sections = {key: SECTIONS[key](**value) for key, value in shape.items() if isinstance(value, dict)}
        return ModelConfig(**{**shape, **sections})
    except (KeyError, TypeError) as error:
        by = f"cheaper {record.get('versions', {}).get('cheaper', 'of another version')}, this is {cheaper.__version__}"
        raise UserError(f"checkpoint {source}: its model has what this version does not know ({error}); {by}") from None


def run_file(source: Path) -> Path:
    """The file in which Composer finds a run's state."""
    return source / RUN if is_shards(source) else source


def save_weights(decoder: Decoder, path: Path, record: dict[str, Any]) -> None:
    """Writes weights without a training around them; stages start from them, and nothing resumes.

    Args:
        decoder: Whole, in one process.
        path: A new file ``step-<n>.pt``.
        record: What they say of where they come from, besides the model's shape and the versions.
    """
    said = {**record, "model": dataclasses.asdict(decoder.config), "versions": versions()}
    weights = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    torch.save({"state": {"model": weights, "callbacks": {"Checkpointer": said}}}, path)


def load_model_weights(source: Path) -> dict[str, torch.Tensor]:
    """The decoder's tensors in the checkpoint ``source``, under the decoder's own names; of shards only what they are.

    Raises:
        UserError: It is not readable.
    """
    return weights_in(source) if is_shards(source) else model_weights(safe_load(source))


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The decoder's tensors in a Composer checkpoint, under the decoder's own names."""
    return {name.removeprefix("model."): tensor for name, tensor in checkpoint["state"]["model"].items()}


def consolidate(source: Path, target: Path) -> None:
    """Puts the shards in ``source`` together in one file in Composer's format, with which the run can go on as well.

    Raises:
        UserError: ``source`` is not readable or has no shards, or ``target`` is there.
    """
    if not is_shards(source):
        raise UserError(f"checkpoint {source}: expected a folder with shards")
    if target.exists():
        raise UserError(f"{target}: is there already; choose another file")
    whole, tensors = safe_load(source / RUN), whole_tensors(source)
    moments = {"state": tensors["optimizer"], "param_groups": safe_load(source / OPTIMIZER)}
    whole["state"] |= {"model": tensors["model"], "optimizers": {"AdamW": moments}}
    partial = target.with_name(f".partial-{target.name}")
    torch.save(whole, partial)
    publish(partial, target)


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


def check_resume(source: Path, decoder: Decoder, rows: int) -> None:
    """Refuses a checkpoint that the run cannot go on from, and says so if other versions wrote it.

    Args:
        source: The checkpoint.
        decoder: Of the run.
        rows: In a step, over all processes.

    Raises:
        UserError: It is of another model, or its steps had another number of rows.
    """
    check_shapes(decoder, load_model_weights(source), str(source))
    record = model_record(source)
    if "rows_per_step" not in record:
        raise UserError(f"checkpoint {source}: holds weights alone; start from it, without training.resume=true")
    before, ours = record["rows_per_step"], versions()
    if dist.get_global_rank() == 0:
        for package, version in record.get("versions", {}).items():
            if version != ours[package]:
                told = f"{source} was written with {package} {version}, this is {ours[package]}"
                print(f"warning: {told}; the run goes on, perhaps not bit for bit", file=sys.stderr)
    if before != rows:
        raise UserError(
            f"training.stage: a step has {rows} rows over all processes, the run to resume had {before} ({source}); "
            "batch_size_per_gpu × gradient_accumulation_steps × processes must stay as it was"
        )


def versions() -> dict[str, str]:
    """Of the packages that decide what a checkpoint holds and what a step computes."""
    packages = {"torch": "torch", "composer": "mosaicml", "transformers": "transformers"}
    others = {name: importlib.metadata.version(package) for name, package in packages.items()}
    return {"cheaper": cheaper.__version__, **others}
