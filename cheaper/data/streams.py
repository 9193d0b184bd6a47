"""MDS shards of several streams, mixed by proportion, as batches.

A batch is a dict of tensors::

    input_ids         [B, T] int64   token ids; rows shorter than the longest are padded with 0 on the right
    labels            [B, T] int64   the same ids, IGNORED where there is no target; the model shifts them
    row_tokens        [B] int64      tokens of the row without padding
    stream            [B] int64      which stream the row comes from, in the order of ``DataConfig.streams``
    sample            [B] int64      the row's number in the whole mixture
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
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from streaming import Stream, StreamingDataset
from streaming.base.storage import CloudDownloader
from torch.utils.data import DataLoader

from cheaper.config import DataConfig
from cheaper.data.manifest import Manifest, TeacherRecord
from cheaper.data.mixing import EVENLY
from cheaper.data.teacher_cache import KeptRow, decode_row
from cheaper.data.tokenize import Tokenizer
from cheaper.errors import UserError
from cheaper.losses.chunked import IGNORED
from cheaper.models.decoder import count_targets


class MixedTokenDataset(StreamingDataset):
    """Rows of tokens drawn from several streams; each row knows its stream and its number.

    Args:
        teacher: How the streams' column ``teacher`` was made, if it is wanted.
        arguments: Streaming's.
    """

    def __init__(self, teacher: TeacherRecord | None = None, **arguments: Any):
        super().__init__(**arguments)
        self.teacher = teacher
        self.batching_method = EVENLY  # the constructor takes only streaming's own

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        row = super().get_item(sample_id, retry)
        shard_id, _ = self.spanner[sample_id]
        if self.teacher:
            row["teacher"] = decode_row(row["teacher"], len(row["input_ids"]), self.teacher)
        return {**row, "sample": sample_id, "stream": int(self.stream_per_shard[shard_id])}


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
    # Streaming's proportions are of rows, ours of tokens.
    rows = {
        name: share * manifests[name].rows / manifests[name].tokens for name, share in shares(data, manifests).items()
    }
    whole = any(stream.proportion is None for stream in data.streams.values())
    streams = [Stream(**location(data, name), **({} if whole else {"proportion": rows[name]})) for name in rows]
    teacher = next(iter(manifests.values())).teacher
    order = {"shuffle": data.shuffle, "shuffle_seed": seed, "teacher": teacher}
    return _dataloader(data, streams, batch_size, data.num_workers, copies, **order)


def build_held_out(data: DataConfig, name: str, batch_size: int, copies: int = 1) -> DataSpec:
    """One of ``data.held_out``, always in the same order."""
    return _dataloader(data, [Stream(**location(data, name))], batch_size, 0, copies, shuffle=False)


def _dataloader(
    data: DataConfig, streams: list[Stream], batch_size: int, num_workers: int, copies: int, **arguments: Any
) -> DataSpec:
    if copies > 1:
        arguments["replication"] = copies
        logging.getLogger("streaming.base.dataset").setLevel(logging.ERROR)  # it warns of what is counted below
    nodes = data.canonical_nodes
    dataset = MixedTokenDataset(streams=streams, batch_size=batch_size, num_canonical_nodes=nodes, **arguments)
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


def collate(rows: list[dict[str, Any]], within_documents: bool = False) -> dict[str, torch.Tensor]:
    """Pads rows to the longest and stacks them into a batch, see the module's docstring."""
    row_tokens = torch.tensor([len(row["input_ids"]) for row in rows])
    width = int(row_tokens.max())
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        tokens = torch.from_numpy(row["input_ids"].astype(np.int64))
        input_ids[i, : len(tokens)] = tokens
        labels[i, : len(tokens)] = torch.where(_has_loss(row), tokens, IGNORED)
        if within_documents:  # nothing that it may see tells a document's first token
            labels[i, row["lengths"].cumsum(dtype=np.int64)[:-1]] = IGNORED
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "row_tokens": row_tokens,
        "stream": torch.tensor([row["stream"] for row in rows]),
        "sample": torch.tensor([row["sample"] for row in rows]),
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


def _has_loss(row: dict[str, Any]) -> torch.Tensor:
    """Which tokens of a row have loss; bool [T]."""
    if "loss_lengths" not in row:
        return torch.ones(len(row["input_ids"]), dtype=torch.bool)
    runs = torch.from_numpy(row["loss_lengths"].astype(np.int64))  # without loss, with, without, …
    return torch.repeat_interleave(torch.arange(len(runs)) % 2 == 1, runs)


def count_tokens(batch: dict[str, torch.Tensor], counted: bool = True) -> dict[str, int]:
    """Tokens without padding, and the targets among them, by which Composer weighs micro-batches and ranks."""
    total = int(batch["row_tokens"].sum()) * counted
    return {"total": total, "loss_generating": int(count_targets(batch["labels"]))}


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
        The manifest of each.

    Raises:
        UserError: Shards are missing, unfinished, cut short, or made for another tokenizer or sequence length.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}: tokenizer {data.tokenizer} has {tokenizer.vocab_size} words, "
            "expected at least as many"
        )
    manifests = {}
    for name in names:
        folder = f"{data.root}/{name}"
        manifest = manifests[name] = _read_manifest(name, folder)
        if not manifest.complete:
            raise UserError(f"data.streams.{name}: the conversion into {folder} has not finished; run it again")
        if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"data.streams.{name}: {folder} was made with tokenizer {manifest.tokenizer_name} "
                f"({manifest.tokenizer_fingerprint[:12]}), the run has {data.tokenizer} ({tokenizer.fingerprint[:12]})"
            )
        if manifest.sequence_length != sequence_length:
            raise UserError(
                f"data.streams.{name}: {folder} has rows of {manifest.sequence_length} tokens, "
                f"training.stage.sequence_length is {sequence_length}; convert again into another data.root"
            )
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
            raise UserError(f"data.streams.{name}: no shards in {folder}; make them with: cheaper convert") from None


def _check_sizes(name: str, folder: Path) -> None:
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        expected = shard["zip_data"] or shard["raw_data"]
        path = folder / expected["basename"]
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            got = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"data.streams.{name}: shard {path} {got}, expected {expected['bytes']} bytes")


def location(data: DataConfig, name: str) -> dict[str, str]:
    if "://" not in data.root:
        return {"local": f"{data.root}/{name}"}
    return {"remote": f"{data.root}/{name}", "local": f"{data.cache}/{data.name}/{name}"}
