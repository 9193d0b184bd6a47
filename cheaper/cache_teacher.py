"""Runs a teacher once over the shards of a mixture and keeps what it says, see ``cheaper.data.teacher_cache``.

Every token shard is cut into parts of some rows; a part becomes one shard of the cache. Any number of processes share
the parts, and one that was killed has lost its unfinished part only. The last to finish writes index and manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist, get_device
from streaming import MDSWriter
from tqdm import tqdm

from cheaper.checkpoints import find_model
from cheaper.config import RunConfig
from cheaper.data.dataset import TokenDataset, TokenStream
from cheaper.data.manifest import MANIFEST, Manifest, TeacherRecord
from cheaper.data.shared_memory import release
from cheaper.data.streams import check_shards, collate, mixed_streams, within_documents
from cheaper.data.teacher_cache import KeptRow, encode_row
from cheaper.data.tokenize import load_tokenizer
from cheaper.errors import UserError, did_you_mean
from cheaper.files import publish, write_atomically
from cheaper.losses.chunked import CHUNK_BYTES
from cheaper.losses.distillation import SparseTeacher
from cheaper.models.teacher import Teacher, check_teacher, load_teacher
from cheaper.precision import compute_dtype

PART_BYTES = 1 << 26


def cache_teacher(config: RunConfig, record: TeacherRecord, only: list[str] | None = None) -> None:
    """Writes the cache of every stream below ``training.teacher_cache``; parts that are there are left as they are.

    Args:
        config: Names the mixture, the teacher, the folder and the temperature; ``batch_size_per_gpu`` rows at a time.
        record: Kind, k and precision; the rest of it is filled in here.
        only: Names of the streams, all by default.

    Raises:
        UserError: Teacher or shards do not fit, or the folder holds the cache of others.
    """
    training, data = config.training, config.data
    if not training.teacher_model or not training.teacher_cache or "://" in training.teacher_cache:
        given = f"training.teacher_model={training.teacher_model}, training.teacher_cache={training.teacher_cache}"
        raise UserError(f"cheaper cache-teacher has {given}: expected a teacher and a folder on this machine")
    if not 1 <= record.k <= 65_535:  # how often a word was drawn is kept in 16 bits
        raise UserError(f"cheaper cache-teacher --k {record.k}: expected 1 to 65535 words")
    for name in only or ():
        if name not in mixed_streams(data):
            raise UserError(f"--only {name}: no such stream in {data.name}{did_you_mean(name, mixed_streams(data))}")
    tokenizer, names = load_tokenizer(data.tokenizer, data.trust_remote_code), only or mixed_streams(data)
    manifests = check_shards(data, names, training.stage.sequence_length, config.model.vocab_size, tokenizer)
    path = check_teacher(training.teacher_model, tokenizer)
    dtype = compute_dtype(config)
    teacher = load_teacher(path, get_device(None)._device, dtype, data.trust_remote_code)
    record = dataclasses.replace(
        record,
        name=training.teacher_model,
        fingerprint=fingerprint(path),
        temperature=training.distillation.temperature,
        words=min(config.model.vocab_size, teacher.output_weight.shape[0]),
    )
    for name in names:
        _cache_stream(name, config, manifests[name], teacher, record)


def check_cache(config: RunConfig, manifests: dict[str, Manifest]) -> None:
    """Refuses a teacher cache that does not fit the run.

    Args:
        config: Of the run.
        manifests: Of the cache's streams.

    Raises:
        UserError: It is no cache, of another teacher or temperature, or of other shards than those in ``data.root``.
    """
    training = config.training
    for name, manifest in manifests.items():
        where, record = f"training.teacher_cache {training.teacher_cache}/{name}", manifest.teacher
        if record is None:
            raise UserError(f"{where} keeps no teacher; make it with: cheaper cache-teacher")
        if training.teacher_model not in (None, record.name):
            path = Path(training.teacher_model)
            if not path.exists() or fingerprint(find_model(str(path), "training.teacher_model")) != record.fingerprint:
                raise UserError(f"{where} is of teacher {record.name}, the run has {training.teacher_model}")
        if record.temperature != training.distillation.temperature:
            asked = f"training.distillation.temperature is {training.distillation.temperature}"
            raise UserError(f"{where} was made at temperature {record.temperature}, {asked}")
        tokens = Path(config.data.root, name, MANIFEST)
        if tokens.is_file() and _of_cache(Manifest.read(tokens), training.stage.sequence_length, record) != manifest:
            raise UserError(f"{where} was made from other shards than those in {tokens.parent}")


def _of_cache(tokens: Manifest, length: int, record: TeacherRecord) -> Manifest:
    """The manifest of a cache made from ``tokens``: its shards have the rows of a training, of ``length`` tokens."""
    return dataclasses.replace(tokens.cut_into(length), teacher=record, cuts=1, parts=[])


def fingerprint(path: Path) -> str:
    """Tells models apart by the sizes of their files and a sample of their bytes; reading all would take minutes."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as content:
            for place in range(0, size, max(1, size // 64)):
                content.seek(place)
                digest.update(content.read(4096))
    return digest.hexdigest()


def _cache_stream(name: str, config: RunConfig, tokens: Manifest, teacher: Teacher, record: TeacherRecord) -> None:
    folder = Path(config.training.teacher_cache, name)
    manifest = _of_cache(tokens, config.training.stage.sequence_length, record)
    try:
        earlier = Manifest.read(folder / MANIFEST)
    except FileNotFoundError:
        earlier = None
    if earlier and dataclasses.replace(earlier, complete=True) != manifest:
        raise UserError(f"{folder} is the cache of another teacher, kind or shards; choose another folder")
    if earlier and earlier.complete:
        print(f"{name}: {tokens.tokens:,} tokens, finished before ({folder})")
        return
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    if dist.get_global_rank() == 0:
        dataclasses.replace(manifest, complete=False).write(folder / MANIFEST)
    dataset = TokenDataset([TokenStream(config.data, name, tokens)], batch_size=1)
    parts = list(_parts(dataset, _rows_per_part(tokens, record)))
    mine = [part for part in parts[dist.get_global_rank() :: dist.get_world_size()] if not _done(folder, part)]
    rows = sum(len(part) for part in mine)
    with tqdm(desc=name, total=rows * tokens.tokens // tokens.rows, unit="tok", unit_scale=True) as bar:
        for part in mine:
            _write_part(folder, part, _kept_rows(part, dataset, config, teacher, record, bar))
    dist.barrier()
    release(dataset)
    if dist.get_global_rank() == 0:
        _finish(folder, parts, manifest)
        size = sum(file.stat().st_size for file in folder.glob("*.mds"))
        print(f"{name}: {tokens.tokens:,} tokens, {size / tokens.tokens:.1f} bytes each ({folder})")


def _rows_per_part(tokens: Manifest, record: TeacherRecord) -> int:
    bytes_per_row = tokens.sequence_length * (8 + 5 * min(record.k, tokens.vocab_size))
    return max(1, PART_BYTES // bytes_per_row)


def _parts(dataset: TokenDataset, rows: int) -> Iterator[range]:
    """Rows of the stream, cut where its shards are cut and after so many rows."""
    begin = 0
    for shard in dataset.shards:
        end = begin + shard.samples
        yield from (range(first, min(first + rows, end)) for first in range(begin, end, rows))
        begin = end


def _name(part: range) -> str:
    return f"rows-{part.start:010d}"


def _done(folder: Path, part: range) -> bool:
    return (folder / f"{_name(part)}.json").exists()


def _kept_rows(
    part: range, dataset: TokenDataset, config: RunConfig, teacher: Teacher, record: TeacherRecord, bar: tqdm
) -> Iterator[dict[str, Any]]:
    device, batch_size = get_device(None)._device, config.training.stage.batch_size_per_gpu
    for first in range(part.start, part.stop, batch_size):
        rows = [dataset[i] for i in range(first, min(first + batch_size, part.stop))]
        batch = collate(rows, within_documents(config.data))
        lengths = batch.get("document_lengths")
        with torch.no_grad():
            lengths = None if lengths is None else lengths.to(device)
            hidden = teacher.hidden(batch["input_ids"].to(device), lengths)
            for place, (row, hidden_TE) in enumerate(zip(rows, hidden, strict=True)):
                generator = torch.Generator(device).manual_seed(config.training.seed + first + place)
                kept = _keep(hidden_TE[: len(row["input_ids"])], teacher.output_weight, record, generator)
                kept_columns = {name: row[name] for name in ("input_ids", "lengths", "loss_lengths") if name in row}
                yield {**kept_columns, "teacher": encode_row(kept, record.k, record.precision == "compact")}
                bar.update(len(row["input_ids"]))


def _keep(
    hidden_TE: torch.Tensor, weight_VE: torch.Tensor, record: TeacherRecord, generator: torch.Generator
) -> KeptRow:
    chunks = []
    for chunk in hidden_TE.split(max(1, CHUNK_BYTES[hidden_TE.device.type] // (4 * record.words))):
        logits = chunk @ weight_VE[: record.words].T
        if record.kind == "top_k":
            chunks.append(SparseTeacher.top(logits, record.k, record.temperature))
        else:
            chunks.append(SparseTeacher.sampled(logits, record.k, record.temperature, generator))
    fields = zip(*((getattr(chunk, f.name) for f in dataclasses.fields(chunk)) for chunk in chunks), strict=True)
    return KeptRow(*(None if values[0] is None else torch.cat(values).cpu().numpy() for values in fields))


def _write_part(folder: Path, part: range, rows: Iterator[dict[str, Any]]) -> None:
    work = folder / f".{_name(part)}"
    shutil.rmtree(work, ignore_errors=True)
    writer = None
    for row in rows:
        if writer is None:
            columns = {name: f"ndarray:{row[name].dtype}" for name in row if name != "teacher"}
            writer = MDSWriter(out=str(work), columns={**columns, "teacher": "bytes"}, size_limit=None)
        writer.write(row)
    writer.finish()
    index = json.loads((work / "index.json").read_text())["shards"][0]
    index["raw_data"]["basename"] = f"{_name(part)}.mds"
    publish(work / "shard.00000.mds", folder / f"{_name(part)}.mds")
    write_atomically(folder / f"{_name(part)}.json", json.dumps(index).encode())
    shutil.rmtree(work)


def _finish(folder: Path, parts: list[range], manifest: Manifest) -> None:
    shards = [json.loads((folder / f"{_name(part)}.json").read_text()) for part in parts]
    write_atomically(folder / "index.json", json.dumps({"version": 2, "shards": shards}).encode())
    manifest.write(folder / MANIFEST)
    for part in parts:
        os.unlink(folder / f"{_name(part)}.json")
