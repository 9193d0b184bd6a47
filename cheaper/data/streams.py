"""MDS shards of several streams, mixed by proportion, as batches.

A batch is a dict of tensors, and of lists where a device has no use for a figure: reading it there would make it wait::

    input_ids         [B, T] int64   token ids; rows shorter than the longest are padded with 0 on the right
    labels            [B, T] int64   the same ids, IGNORED where there is no target; the model shifts them
    row_tokens        B integers     tokens of each row without padding
    row_targets       B integers     targets of each row
    stream            B integers     which stream each row comes from, in the order of ``DataConfig.streams``
    sample            B integers     each row's number in the whole mixture
    document_lengths  [B, N] int64   only where attention stays inside documents: their lengths, then those of the
                                     padding and zeros; T in all
    teacher_…                        only from a teacher cache: ids, probabilities [B, T, K] and most_likely, tail or
                                     entropy [B, T], the fields of ``SparseTeacher``
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from streaming.base.storage import CloudDownloader
from torch.utils.data import DataLoader

from cheaper.config import DataConfig
from cheaper.data.dataset import TokenDataset, TokenStream
from cheaper.data.manifest import Manifest
from cheaper.data.teacher_cache import KeptRow
from cheaper.data.tokenize import Tokenizer
from cheaper.errors import UserError
from cheaper.losses.chunked import IGNORED
from cheaper.models.decoder import count_targets

MOST_EPOCH_ROWS = 1 << 23  # whose order is in memory at once; 17 billion tokens in rows of 2,048


class MissingShardsError(UserError):
    """Shards are not there. The message ends with the command that makes them, without its arguments."""


def mixed_streams(data: DataConfig) -> list[str]:
    """Names of the streams that take part: those whose proportion is not 0."""
    return [name for name, stream in data.streams.items() if stream.proportion != 0]


def shares(data: DataConfig, manifests: dict[str, Manifest]) -> dict[str, float]:
    """Each stream's share of the tokens: as asked, or where no proportions are given as large as it is."""
    asked = {name: data.streams[name].proportion for name in mixed_streams(data)}
    weights = {name: manifests[name].tokens if share is None else share for name, share in asked.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def row_length(data: DataConfig, manifests: dict[str, Manifest]) -> float:
    """Tokens in a row of the mixture, on average."""
    return 1 / sum(
        share * manifests[name].rows / manifests[name].tokens for name, share in shares(data, manifests).items()
    )


def epoch_tokens(data: DataConfig, manifests: dict[str, Manifest]) -> float:
    """Tokens of an epoch: as many rows as the streams have, in the mixture's shares."""
    return row_length(data, manifests) * sum(manifests[name].rows for name in mixed_streams(data))


def build_dataloader(
    data: DataConfig, manifests: dict[str, Manifest], batch_size: int, seed: int, copies: int = 1
) -> DataSpec:
    """The training data of one device.

    Args:
        data: The mixture.
        manifests: What ``check_shards`` found.
        batch_size: Rows per device and optimizer step.
        seed: Seed of the shuffle.
        copies: Neighbouring devices that see the same rows.
    """
    # The mixture's shares are of tokens; a row of one stream may have fewer than one of another.
    of_tokens = shares(data, manifests)
    of_rows = {name: share * manifests[name].rows / manifests[name].tokens for name, share in of_tokens.items()}
    streams = [TokenStream(data, name, manifests[name]) for name in of_rows]
    order = {"shares": list(of_rows.values()), "shuffle": data.shuffle, "shuffle_seed": seed}
    order["epoch_size"] = epoch_rows(
        sum(manifests[name].rows for name in of_rows),
        step=math.lcm(batch_size * dist.get_world_size() // copies, data.canonical_nodes),
    )
    return _dataloader(data, streams, batch_size, data.num_workers, copies, **order)


def epoch_rows(rows: int, step: int) -> int:
    """Rows of one of streaming's epochs: all, or where there are too many as many whole steps as may be.

    Args:
        rows: Of all streams.
        step: Rows that all devices see in a step.
    """
    return rows if rows <= MOST_EPOCH_ROWS else MOST_EPOCH_ROWS // step * step


def build_held_out(data: DataConfig, name: str, manifest: Manifest, batch_size: int, copies: int = 1) -> DataSpec:
    """One of ``data.held_out``, always in the same order."""
    return _dataloader(data, [TokenStream(data, name, manifest)], batch_size, 0, copies)


def _dataloader(
    data: DataConfig, streams: list[TokenStream], batch_size: int, num_workers: int, copies: int, **arguments: Any
) -> DataSpec:
    if copies > 1:
        arguments["replication"] = copies
        logging.getLogger("streaming.base.dataset").setLevel(logging.ERROR)  # it warns of what is counted below
    nodes = data.canonical_nodes
    dataset = TokenDataset(streams, batch_size=batch_size, num_canonical_nodes=nodes, **arguments)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=functools.partial(collate, within_documents=within_documents(data)),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
    )
    counted = dist.get_global_rank() % copies == 0  # Composer adds up what devices say: each row is said once
    return DataSpec(
        loader,
        get_num_samples_in_batch=lambda batch: len(batch["row_tokens"]) * counted,
        get_num_tokens_in_batch=lambda batch: count_tokens(batch, counted),
    )


def _leave_signals_to_the_parent(_worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the parent still needs its data to finish the step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def within_documents(data: DataConfig) -> bool:
    """Whether attention stays inside the documents of a row."""
    return data.intra_document_attention or data.packing


def collate(rows: list[dict[str, Any]], within_documents: bool = False) -> dict[str, torch.Tensor | list[int]]:
    """Pads rows to the longest and stacks them into a batch, see the module's docstring."""
    row_tokens = [len(row["input_ids"]) for row in rows]
    width = max(row_tokens)
    input_ids = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), IGNORED)
    for row, tokens, ids, targets in zip(rows, row_tokens, input_ids, labels, strict=True):
        ids[:tokens] = row["input_ids"]
        np.copyto(targets[:tokens], ids[:tokens], where=_has_loss(row))
        if within_documents:  # nothing that it may see tells a document's first token
            targets[row["lengths"].cumsum(dtype=np.int64)[:-1]] = IGNORED
    input_ids, labels = torch.from_numpy(input_ids), torch.from_numpy(labels)
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "row_tokens": row_tokens,
        "row_targets": count_targets(labels, dim=-1).tolist(),
        "stream": [row["stream"] for row in rows],
        "sample": [row["sample"] for row in rows],
    }
    if within_documents:
        # Padding is a document of its own: nothing real attends to it.
        lengths = [[*row["lengths"].tolist(), width - len(row["input_ids"])] for row in rows]
        most = max(map(len, lengths))
        batch["document_lengths"] = torch.tensor([row + [0] * (most - len(row)) for row in lengths])
    if isinstance(rows[0].get("teacher"), KeptRow):
        batch |= _collate_teacher([row["teacher"] for row in rows], width)
    return batch


def _collate_teacher(rows: list[KeptRow], width: int) -> dict[str, torch.Tensor]:
    most = max(row.ids.shape[1] for row in rows)
    batch = {}
    for field in dataclasses.fields(KeptRow):
        values = [getattr(row, field.name) for row in rows]
        if values[0] is not None:
            shape = (len(rows), width, most)[: values[0].ndim + 1]
            batch[f"teacher_{field.name}"] = padded = torch.zeros(shape, dtype=torch.from_numpy(values[0]).dtype)
            for i, value in enumerate(values):
                padded[(i, *map(slice, value.shape))] = torch.from_numpy(value)
    return batch


def _has_loss(row: dict[str, Any]) -> np.ndarray | bool:
    """Which tokens of a row have loss: bool [T], or all."""
    if "loss_lengths" not in row:
        return True
    runs = row["loss_lengths"]  # without loss, with, without, …
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def count_tokens(batch: dict[str, torch.Tensor | list[int]], counted: bool = True) -> dict[str, int]:
    """Tokens without padding, and the targets among them, by which Composer weighs micro-batches and ranks."""
    return {"total": sum(batch["row_tokens"]) * counted, "loss_generating": sum(batch["row_targets"])}


def check_shards(
    data: DataConfig, names: Iterable[str], sequence_length: int, vocab_size: int, tokenizer: Tokenizer
) -> dict[str, Manifest]:
    """Refuses shards that do not belong to this run, naming both values.

    Args:
        data: The mixture.
        names: Of the streams and held-out sets to look at.
        sequence_length: Tokens per row of the run.
        vocab_size: Words of the model.
        tokenizer: The run's tokenizer.

    Returns:
        The manifest of each, as the run sees it.

    Raises:
        UserError: Shards are missing, unfinished, cut short, or made for another tokenizer or row length.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}: tokenizer {data.tokenizer} has {tokenizer.vocab_size} words, "
            "expected at least as many"
        )
    manifests = {}
    for name in names:
        folder = f"{data.root}/{name}"
        manifest = _read_manifest(name, folder)
        if not manifest.complete:
            raise UserError(f"data.streams.{name}: the conversion into {folder} has not finished; run it again")
        if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"data.streams.{name}: {folder} was made with tokenizer {manifest.tokenizer_name} "
                f"({manifest.tokenizer_fingerprint[:12]}), the run has {data.tokenizer} ({tokenizer.fingerprint[:12]})"
            )
        try:
            manifests[name] = manifest.cut_into(sequence_length)
        except ValueError as error:
            told = f"{folder} has {error}, training.stage.sequence_length"
            hint = f"convert and train with data.row_length={sequence_length}, into another data.root"
            raise UserError(f"data.streams.{name}: {told}; {hint}") from None
        if manifest.chat_template and manifest.packing != data.packing:
            raise UserError(
                f"data.streams.{name}: {folder} was made with data.packing={manifest.packing}, the run has "
                f"{data.packing}; convert again into another data.root"
            )
        if "://" not in data.root:
            _check_sizes(name, Path(folder))
    return manifests


def _read_manifest(name: str, folder: str) -> Manifest:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder) / "manifest.json"
        try:
            if "://" in folder:
                path = Path(temporary) / "manifest.json"
                CloudDownloader.direct_download(f"{folder}/manifest.json", str(path))
            return Manifest.read(path)
        except FileNotFoundError:
            raise MissingShardsError(
                f"data.streams.{name}: no shards in {folder}; make them with: cheaper convert"
            ) from None


def _check_sizes(name: str, folder: Path) -> None:
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        expected = shard["zip_data"] or shard["raw_data"]
        path = folder / expected["basename"]
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            got = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"data.streams.{name}: shard {path} {got}, expected {expected['bytes']} bytes")
