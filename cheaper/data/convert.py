"""Raw rows to MDS shards of token rows, one folder per stream.

    rows ──workers: parse, format, tokenise──▶ documents ──parent: join, cut──▶ token rows ──▶ MDS shards

A document is BOS, its tokens, EOS. Documents are joined and cut into rows of ``sequence_length``; a document goes on in
the next row, and only the last row of a stream is shorter. Columns of a row: ``input_ids``, and ``lengths`` of the
pieces of documents in it, both in the narrowest unsigned type.

One process reads and writes, in order, so the shards are the same bytes whatever the number of workers. After each
shard the manifest says where to go on; a conversion that was killed goes on from there with the same command.

With a ``data.root`` such as ``s3://…`` the shards are written below ``data.cache/converting``, uploaded while the work
goes on, and removed there. What remains, the manifest and the side file, is what the same command needs to go on, so it
must run on the same machine, or with the same ``data.cache``. The manifest is uploaded last and marks the stream as
finished everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cheaper.config import DataConfig, StreamConfig
from cheaper.data.formats import UnusableRow, get_format
from cheaper.data.manifest import MANIFEST, Manifest
from cheaper.data.rows import Position, RowCutter
from cheaper.data.shards import ShardWriter, narrowest, one_line
from cheaper.data.sources import RawRow, Source
from cheaper.data.tokenize import Tokenizer, load_tokenizer
from cheaper.errors import UserError, did_you_mean

BATCH_BYTES = 1 << 20  # raw bytes handed to a worker at a time
BATCHES_AHEAD = 3  # per worker; bounds the memory


def convert_mixture(
    data: DataConfig, sequence_length: int, processes: int | None = None, only: list[str] | None = None
) -> dict[str, Manifest]:
    """Converts every stream of a mixture and what it holds out; those that are finished are left as they are.

    Args:
        data: The mixture. A ``data.root`` with a scheme (``s3://`` …) is uploaded to.
        sequence_length: Tokens per row.
        processes: Worker processes, all cores by default.
        only: Names of the streams to convert, all by default.

    Returns:
        The manifest of each stream.

    Raises:
        UserError: A stream cannot be read or written, or its folder was made from something else.
    """
    streams = {**data.streams, **data.held_out}
    for name in only or ():
        if name not in streams:
            raise UserError(f"--only {name}: no such stream in {data.name}{did_you_mean(name, streams)}")
    tokenizer = load_tokenizer(data.tokenizer, data.trust_remote_code)
    return {
        name: convert_stream(name, streams[name], data, tokenizer, sequence_length, processes or os.cpu_count())
        for name in only or streams
    }


def convert_stream(
    name: str, stream: StreamConfig, data: DataConfig, tokenizer: Tokenizer, sequence_length: int, processes: int
) -> Manifest:
    """Converts one stream into ``<data.root>/<name>``, or goes on where a killed conversion stopped."""
    get_format(stream.format, stream.field)  # a wrong name is told before anything is made
    remote = f"{data.root}/{name}" if "://" in data.root else None
    folder = Path(data.cache, "converting", data.root.replace("://", "/"), name) if remote else Path(data.root, name)
    manifest = _new_manifest(stream, tokenizer, sequence_length)
    if earlier := _earlier_manifest(folder, remote):
        for key, now in manifest.made_from().items():
            if earlier.made_from()[key] != now:
                was = f"was made with {key} {earlier.made_from()[key]}, now it is {now}"
                raise UserError(f"{remote or folder} {was}; choose another data.root")
        manifest = earlier
    where = remote or folder
    if manifest.complete:
        print(f"{name}: {manifest.tokens:,} tokens in {manifest.rows:,} rows, finished before ({where})")
        return manifest
    source = Source(stream.source, name)
    if manifest.shards and manifest.source_bytes != source.total_bytes:
        was = f"had {manifest.source_bytes} bytes when the conversion into {folder} began, now {source.total_bytes}"
        raise UserError(f"data.streams.{name}: {stream.source.path} {was}; choose another data.root")
    manifest.source_bytes = source.total_bytes
    try:
        with (
            _locked(folder),
            _pool(processes, tokenizer, stream.format, stream.field) as pool,
            _Progress(name, source) as progress,
        ):
            manifest.write(folder / MANIFEST)  # marks the folder as this conversion's
            batches = _in_order(pool, _tokenise, _batches(source, manifest.next_row), processes * BATCHES_AHEAD)
            _write(batches, folder, remote, manifest, progress)
    except BrokenProcessPool:
        raise UserError(f"data.streams.{name}: a worker process died; the same command goes on from here") from None
    except OSError as error:  # reading has errors of its own, see Source
        room = "free some space, and " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        why = f"cannot be written ({error.strerror or error}); {room}the same command goes on from here"
        raise UserError(f"data.streams.{name}: {folder} {why}") from None
    except KeyboardInterrupt:
        raise UserError(f"data.streams.{name}: stopped; the same command goes on from here") from None
    print(f"{name}: {manifest.tokens:,} tokens in {manifest.rows:,} rows, {manifest.skipped:,} skipped ({where})")
    return manifest


def _new_manifest(stream: StreamConfig, tokenizer: Tokenizer, sequence_length: int) -> Manifest:
    return Manifest(
        tokenizer_name=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        sequence_length=sequence_length,
        source=dataclasses.asdict(stream.source),
        format=stream.format,
        field=stream.field,
    )


def _earlier_manifest(folder: Path, remote: str | None) -> Manifest | None:
    """The manifest of an earlier conversion into ``folder``, or of a finished one uploaded to ``remote``."""
    try:
        return Manifest.read(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists() and any(not path.name.startswith(f".{MANIFEST}") for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no {MANIFEST}; choose another data.root") from None
    if not remote:
        return None
    from streaming.base.storage import CloudDownloader

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, MANIFEST)
        try:
            CloudDownloader.direct_download(f"{remote}/{MANIFEST}", str(path))
            return Manifest.read(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # of a storage library
            raise UserError(f"data.root: {remote} cannot be read ({one_line(error)})") from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes ``folder`` and keeps other conversions out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another conversion is writing there") from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _pool(processes: int, tokenizer: Tokenizer, format_name: str, field: str) -> Iterator[ProcessPoolExecutor]:
    """Workers that leave Ctrl-C to the parent."""
    with tempfile.TemporaryDirectory() as folder:
        # Through a file: a pipe is too narrow for a vocabulary, and a worker that dies before it has read all of one
        # (the calling script lacks ``if __name__ == "__main__"``, say) would leave the parent writing for ever.
        path = Path(folder, "tokenizer")
        path.write_bytes(pickle.dumps(tokenizer))
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, spawn, _start_worker, (path, format_name, field))
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # children inherit it; all start here
        try:
            pool.submit(os.getpid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


# ---- in the workers


@dataclass
class _Tokenised:
    """A batch of rows as documents: their tokens end to end, their lengths, and what could not be used."""

    tokens: np.ndarray
    lengths: np.ndarray  # int64, tokens of each document with BOS and EOS
    ordinals: np.ndarray  # int64, which raw row each document is, counted over the stream
    unusable: list[dict[str, Any]]
    rows: int
    bytes_read: int


def _start_worker(tokenizer: Path, format_name: str, field: str) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = (pickle.loads(tokenizer.read_bytes()), get_format(format_name, field))


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for its next batch for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenise(batch: tuple[list[RawRow], int, int]) -> _Tokenised:
    rows, first, bytes_read = batch
    tokenizer, to_text = _worker
    texts, ordinals, unusable = [], [], []
    for ordinal, row in enumerate(rows, first):
        try:
            text = to_text(row.parse())
            if not text.strip():
                raise UnusableRow("empty text")
            text.encode("utf-8")  # JSON can spell lone surrogates, which are no text
        except (UnusableRow, UnicodeEncodeError) as error:
            excerpt = repr(row.content if isinstance(row.content, dict) else row.content[:200])[:200]
            place = {"row": ordinal, "file": row.file, "row_of_file": row.number}
            unusable.append({**place, "reason": str(error), "excerpt": excerpt})
            continue
        texts.append(text)
        ordinals.append(ordinal)
    encoded = tokenizer.encode_batch(texts)
    dtype = narrowest(tokenizer.vocab_size)
    before = [] if tokenizer.bos_id is None else [np.array([tokenizer.bos_id], dtype)]
    after = np.array([tokenizer.eos_id], dtype)
    pieces = [piece for ids in encoded for piece in (*before, ids.astype(dtype, copy=False), after)]
    return _Tokenised(
        tokens=np.concatenate(pieces) if pieces else np.empty(0, dtype),
        lengths=np.array([len(ids) + len(before) + 1 for ids in encoded], np.int64),
        ordinals=np.array(ordinals, np.int64),
        unusable=unusable,
        rows=len(rows),
        bytes_read=bytes_read,
    )


# ---- in the parent


def _batches(source: Source, skip: int) -> Iterator[tuple[list[RawRow], int, int]]:
    """Rows in batches of about ``BATCH_BYTES`` with the number of the first, without the first ``skip`` rows."""
    batch: list[RawRow] = []
    size, count, read_before = 0, 0, source.bytes_read()
    for count, row in enumerate(source, 1):
        if count <= skip:
            continue
        batch.append(row)
        size += _size(row)
        if size >= BATCH_BYTES:
            yield batch, count - len(batch), source.bytes_read() - read_before
            batch, size, read_before = [], 0, source.bytes_read()
    if batch:
        yield batch, count - len(batch), source.bytes_read() - read_before


def _size(value: Any) -> int:
    """About how many bytes a raw row or a value in it takes."""
    if isinstance(value, RawRow):
        return _size(value.content)
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int
) -> Iterator[Any]:
    """``map`` over the pool that reads at most ``ahead`` items before their turn."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        del item  # a batch is in memory once
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write(
    batches: Iterator[_Tokenised], folder: Path, remote: str | None, manifest: Manifest, progress: _Progress
) -> None:
    side_file = folder / "skipped.jsonl"
    _drop_rows_from(side_file, manifest.next_row)
    start = Position(manifest.next_row, manifest.next_token, manifest.documents)
    cutter, writer = RowCutter(manifest.sequence_length, start), ShardWriter(folder, remote, manifest)
    raw_rows = start.row
    for batch in batches:
        with open(side_file, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in batch.unusable)
        cutter.add(batch.tokens, batch.lengths, batch.ordinals)
        for row in cutter.rows():
            writer.write(*row)
        raw_rows += batch.rows
        progress.update(batch)
    for row in cutter.rows(last=True):
        writer.write(*row)
    with open(side_file) as file:
        first = file.readline()
        skipped = bool(first) + sum(1 for _ in file)
    if not writer.rows:
        where = manifest.source["path"] or manifest.source["dataset"]
        reason = (
            f"all {skipped} rows were skipped, the first: {json.loads(first)['reason']}" if first else "it is empty"
        )
        shutil.rmtree(folder)
        raise UserError(f"data.streams.{progress.name}: {where} gave no text; {reason}")
    writer.finish(Position(raw_rows, 0, cutter.documents), skipped)


def _drop_rows_from(side_file: Path, next_row: int) -> None:
    """Cuts from the side file the rows that will be met again, and a line that a kill cut short."""
    with open(side_file, "ab+") as file:
        file.seek(0)
        size = 0
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["row"] >= next_row:
                break
            size += len(line)
        file.truncate(size)


class _Progress:
    """A bar over the bytes of the source with documents and tokens per second."""

    def __init__(self, name: str, source: Source):
        self.name, self.documents, self.tokens, self.begun = name, 0, 0, time.perf_counter()
        self.bar = tqdm(desc=name, total=source.total_bytes, unit="B", unit_scale=True, dynamic_ncols=True)
        if not self.bar.fp.isatty():
            self.bar.mininterval = 30

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, batch: _Tokenised) -> None:
        self.documents += len(batch.lengths)
        self.tokens += len(batch.tokens)
        speed = self.tokens / (time.perf_counter() - self.begun)
        self.bar.set_postfix_str(f"{self.documents:,} documents, {speed / 1e6:.2f}M tokens/s", refresh=False)
        self.bar.update(batch.bytes_read)
