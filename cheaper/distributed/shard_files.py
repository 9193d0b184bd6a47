"""Checkpoints of a divided model: a folder into which every process writes its shards.

    step-00000010/
        run.pt          Composer's state of the run but the tensors below: step, schedule, place in the data, RNG …
        optimizer.pt    the optimizer's settings
        .metadata       which tensors there are, and in which files
        __0_0.distcp …  the shards of each process: model.<name> and optimizer.<name>.<moment>

PyTorch's distributed checkpoint (DCP) writes and reads them; each reader takes what it needs, however many there are.
"""

from __future__ import annotations

import pickle
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import composer.utils.checkpoint as composer_checkpoint
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from composer.core import State
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from cheaper.errors import UserError

RUN = "run.pt"
OPTIMIZER = "optimizer.pt"
# What ``.metadata`` is made of; unpickling these runs no code of the file's.
HARMLESS = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        *(_StorageInfo, _MEM_FORMAT_ENCODING, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta),
        *(TensorProperties, TensorStorageMetadata, torch.Size, type(Path())),
        torch.serialization._get_layout,
    )
}


def is_shards(path: Path) -> bool:
    """Whether ``path`` is such a folder."""
    return (path / RUN).is_file()


def write_shards(state: State, folder: Path, group: dist.ProcessGroup) -> Future:
    """Copies the shards and writes them while training goes on; on every process.

    Args:
        state: Of the run.
        folder: New.
        group: For the writers alone, on the CPU.

    Returns:
        Is done when this process has written its part, on rank 0 when all have.
    """
    model, (optimizer,) = state.model, state.optimizers
    moments = get_optimizer_state_dict(model, optimizer)
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    whole, state.serialized_attributes = (
        state.serialized_attributes,
        [name for name in state.serialized_attributes if name not in ("model", "optimizers")],
    )
    try:
        composer_checkpoint.save_checkpoint(state, str(folder / RUN))
    finally:
        state.serialized_attributes = whole
    if dist.get_rank() == 0:
        torch.save(moments["param_groups"], folder / OPTIMIZER)
    tensors = {"model": get_model_state_dict(model), "optimizer": moments["state"]}
    return dcp.async_save(tensors, checkpoint_id=folder, process_group=group)


def read_shards(state: State, folder: Path) -> None:
    """Fills model and optimizer, divided in any way or not at all."""
    model, (optimizer,) = state.model, state.optimizers
    moments = get_optimizer_state_dict(model, optimizer)
    tensors = {"model": get_model_state_dict(model), "optimizer": moments["state"]}
    _load(tensors, folder)
    groups = torch.load(folder / OPTIMIZER, weights_only=True)
    set_model_state_dict(model, tensors["model"])
    set_optimizer_state_dict(model, optimizer, {"state": tensors["optimizer"], "param_groups": groups})


def fill_from_shards(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Fills the decoder's tensors, or this process's shards of them, under the decoder's own names."""
    _load({"model": {f"model.{name}": tensor for name, tensor in weights.items()}}, folder)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The decoder's tensors in ``folder``, without memory."""
    found = {}
    for key, kept in _Reader(folder).read_metadata().state_dict_metadata.items():
        if key.startswith("model.model."):
            found[key.removeprefix("model.model.")] = torch.empty(kept.size, dtype=kept.properties.dtype, device="meta")
    return found


def whole_tensors(folder: Path) -> dict[str, Any]:
    """All that the shards hold, put together in this process's memory: ``{"model": …, "optimizer": …}``."""
    metadata = _Reader(folder).read_metadata()
    tensors: dict[str, Any] = {}
    for key, path in metadata.planner_data.items():
        kept, place = metadata.state_dict_metadata[key], tensors
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = torch.empty(kept.size, dtype=kept.properties.dtype)
    _load(tensors, folder)
    return tensors


def _load(tensors: dict[str, Any], folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            # Each process reads for itself: there is nothing to agree on, and a process may read alone.
            dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)
    except (dcp.CheckpointException, OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"checkpoint {folder}: its shards are not readable ({reason})") from None


class _Reader(dcp.FileSystemReader):
    """Reads without running any code that the files may contain."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        try:
            with open(Path(self.path, ".metadata"), "rb") as file:
                metadata = _Unpickler(file).load()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"checkpoint {self.path}: its .metadata is not readable ({error})") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"refused: it holds {module}.{name}")
        return HARMLESS[module, name]
