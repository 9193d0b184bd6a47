"""Raw rows to MDS shards of token rows, one folder per stream.

    rows ──workers: parse, format, tokenise──▶ documents ──parent: join, cut──▶ token rows ──▶ MDS shards

A document of text is BOS, its tokens, EOS. Documents are joined and cut into rows of ``data.row_length``; a document
goes on in the next row, and only the last row of a stream is shorter. A chat is what its template makes of it, and
stays whole: it has a row of its own, or with ``data.packing`` shares one. Columns of a row: ``input_ids``, ``lengths``
of the documents or their pieces in it, and for chats ``loss_lengths``, all in the narrowest unsigned type.

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
import hashlib
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
from cheaper.data.chat import ChatTemplate, EncodedChat
from cheaper.data.formats import Format, UnusableRow, get_format
from cheaper.data.manifest import MANIFEST, Manifest
from cheaper.data.rows import ChatRows, Position, RowCutter
from cheaper.data.shards import ShardWriter, narrowest, one_line
from cheaper.data.sources import RawRow, Source
from cheaper.data.tokenize import Tokenizer, load_tokenizer
from cheaper.errors import UserError, did_you_mean

BATCH_BYTES = 1 << 20  # raw bytes handed to a worker at a time
BATCHES_AHEAD = 3  # per worker; bounds the memory


def convert_mixture(
    data: DataConfig, row_length: int, processes: int | None = None, only: list[str] | None = None
) -> dict[str, Manifest]:
    """Converts every stream of a mixture and what it holds out; those that are finished are left as they are.

    Args:
        data: The mixture. A ``data.root`` with a scheme (``s3://`` …) is uploaded to.
        row_length: Tokens per row.
        processes: Worker processes, all cores by default.
        only: Names of the streams to convert, all by default.

    Returns:
        The manifest of each stream.

    Raises:
        UserError: A stream cannot be read or written, or its folder was made from something else.
    """
    tokenizer = load_tokenizer(data.tokenizer, data.trust_remote_code)
    return {
        name: convert_stream(name, stream, data, tokenizer, row_length, processes or os.cpu_count())
        for name, stream in chosen(data, only).items()
    }


def chosen(data: DataConfig, only: list[str] | None) -> dict[str, StreamConfig]:
    """Of a mixture and what it holds out the streams named in ``only``, or all.

    Raises:
        UserError: There is no stream of that name.
    """
    streams = {**data.streams, **data.held_out}
    for name in only or ():
        if name not in streams:
            raise UserError(f"--only {name}: no such stream in {data.name}{did_you_mean(name, streams)}")
    return {name: streams[name] for name in only or streams}


def convert_stream(
    name: str,
    stream: StreamConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    row_length: int,
    processes: int,
    part: slice = slice(None),
) -> Manifest:
    """Converts one stream, or ``part`` of its files, into ``<data.root>/<name>``.

    It goes on where a killed conversion stopped.
    """
    read = get_format(stream.format, stream.field)
    template = ChatTemplate.load(data.chat_template, data.tokenizer, tokenizer) if read.is_chat else None
    maker = _Maker(tokenizer, read, template, row_length, data.too_long)
    remote = f"{data.root}/{name}" if "://" in data.root else None
    folder = Path(data.cache, "converting", data.root.replace("://", "/"), name) if remote else Path(data.root, name)
    manifest = _new_manifest(stream, data, maker)
    if part != slice(None):
        manifest.source |= {"files": [part.start, part.stop]}
    earlier = _earlier_manifest(folder, remote)
    if earlier and (earlier.complete or earlier.shards):  # nothing else would be lost
        for key, now in manifest.made_from().items():
            if earlier.made_from()[key] != now:
                was = f"was made with {key} {earlier.made_from()[key]}, now it is {now}"
                raise UserError(f"{remote or folder} {was}; choose another data.root")
        manifest = earlier
    where = remote or folder
    if manifest.complete:
        print(f"{name}: {manifest.tokens:,} tokens in {manifest.rows:,} rows, finished before ({where})")
        return manifest
    source = Source(stream.source, name, part)
    if manifest.shards and manifest.source_bytes != source.total_bytes:
        was = f"had {manifest.source_bytes} bytes when the conversion into {folder} began, now {source.total_bytes}"
        raise UserError(
            f"data.streams.{name}: {stream.source.path or stream.source.listed_in} {was}; choose another data.root"
        )
    manifest.source_bytes = source.total_bytes
    try:
        with (
            _locked(folder),
            _pool(processes, maker) as pool,
            _Progress(name, source) as progress,
        ):
            manifest.write(folder / MANIFEST)  # marks the folder as this conversion's
            raw = _batches(source, manifest.next_row, {ordinal for ordinal, _ in manifest.held})
            _write(_in_order(pool, _tokenise, raw, processes * BATCHES_AHEAD), folder, remote, manifest, progress)
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


def _new_manifest(stream: StreamConfig, data: DataConfig, maker: _Maker) -> Manifest:
    tokenizer, template = maker.tokenizer, maker.template
    return Manifest(
        tokenizer_name=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        sequence_length=maker.length,
        source=dataclasses.asdict(stream.source),
        format=stream.format,
        field=stream.field,
        chat_template=hashlib.sha256(template.source.encode()).hexdigest() if template else None,
        packing=bool(template) and data.packing,
        too_long=data.too_long if template else None,
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
def _pool(processes: int, maker: _Maker) -> Iterator[ProcessPoolExecutor]:
    """Workers that leave Ctrl-C to the parent."""
    with tempfile.TemporaryDirectory() as folder:
        # Through a file: a pipe is too narrow for a vocabulary, and a worker that dies before it has read all of one
        # (the calling script lacks ``if __name__ == "__main__"``, say) would leave the parent writing for ever.
        path = Path(folder, "maker")
        path.write_bytes(pickle.dumps(maker))
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, spawn, _start_worker, (path,))
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
    lengths: np.ndarray  # int64, tokens of each document
    ordinals: np.ndarray  # int64, which raw row each document is, counted over the stream
    loss: np.ndarray | None  # bool, of each token; of chats only
    unusable: list[dict[str, Any]]
    next_row: int  # after those of the batch
    bytes_read: int


@dataclass
class _Maker:
    """Makes documents of raw rows.

    Args:
        tokenizer: Of the stream.
        read: Its format.
        template: Where the format gives chats.
        length: Tokens of a row.
        too_long: What becomes of a chat that is longer: ``drop`` or ``cut``.
    """

    tokenizer: Tokenizer
    read: Format
    template: ChatTemplate | None
    length: int
    too_long: str

    def text(self, row: RawRow) -> str:
        """The text of one row."""
        text = self.read(row.parse())
        if not text.strip():
            raise UnusableRow("empty text")
        text.encode("utf-8")  # JSON can spell lone surrogates, which are no text
        return text

    def chat(self, row: RawRow) -> EncodedChat:
        """The tokens of one row's chat, and where they have loss."""
        chat = self.template.encode(self.read(row.parse()))
        if len(chat.ids) > self.length:
            if self.too_long == "drop":
                raise UnusableRow(f"the chat has {len(chat.ids)} tokens, a row {self.length}")
            chat = EncodedChat(chat.ids[: self.length], chat.loss[: self.length])
            if not chat.loss.any():
                raise UnusableRow(f"cut to {self.length} tokens, the chat has no loss")
        return chat

    def tokens(self, texts: list[str]) -> list[np.ndarray]:
        """Each text between BOS and EOS."""
        bos, eos = self.tokenizer.bos_id, np.array([self.tokenizer.eos_id], np.uint32)
        before = [] if bos is None else [np.array([bos], np.uint32)]
        return [np.concatenate([*before, ids, eos]) for ids in self.tokenizer.encode_batch(texts)]


def _start_worker(maker: Path) -> None:
    global _maker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _maker = pickle.loads(maker.read_bytes())


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for its next batch for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenise(batch: tuple[list[RawRow], list[int], int]) -> _Tokenised:
    rows, numbers, bytes_read = batch
    chats = _maker.template is not None
    made, ordinals, unusable = [], [], []
    for ordinal, row in zip(numbers, rows, strict=True):
        try:
            made.append(_maker.chat(row) if chats else _maker.text(row))
            ordinals.append(ordinal)
        except (UnusableRow, UnicodeEncodeError) as error:
            excerpt = repr(row.content if isinstance(row.content, dict) else row.content[:200])[:200]
            place = {"row": ordinal, "file": row.file, "row_of_file": row.number}
            unusable.append({**place, "reason": str(error), "excerpt": excerpt})
    documents = [chat.ids for chat in made] if chats else _maker.tokens(made)
    dtype = narrowest(_maker.tokenizer.vocab_size)
    return _Tokenised(
        tokens=np.concatenate([np.empty(0, dtype), *(ids.astype(dtype) for ids in documents)]),
        lengths=np.array([len(ids) for ids in documents], np.int64),
        ordinals=np.array(ordinals, np.int64),
        loss=np.concatenate([np.empty(0, bool), *(chat.loss for chat in made)]) if chats else None,
        unusable=unusable,
        next_row=numbers[-1] + 1,
        bytes_read=bytes_read,
    )


# ---- in the parent


def _batches(source: Source, skip: int, held: set[int]) -> Iterator[tuple[list[RawRow], list[int], int]]:
    """Rows in batches of about ``BATCH_BYTES`` with their numbers, without the first ``skip`` rows but for ``held``."""
    batch: list[RawRow] = []
    numbers: list[int] = []
    size, read_before = 0, source.bytes_read()
    for number, row in enumerate(source):
        if number < skip and number not in held:
            continue
        batch.append(row)
        numbers.append(number)
        size += _size(row)
        if size >= BATCH_BYTES:
            yield batch, numbers, source.bytes_read() - read_before
            batch, numbers, size, read_before = [], [], 0, source.bytes_read()
    if batch:
        yield batch, numbers, source.bytes_read() - read_before


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
    held = tuple((ordinal, rounds) for ordinal, rounds in manifest.held)
    start = Position(manifest.next_row, manifest.next_token, manifest.documents, held)
    writer = ShardWriter(folder, remote, manifest)
    cutter = RowCutter(manifest.sequence_length, start)
    if manifest.chat_template:
        cutter = ChatRows(manifest.sequence_length, manifest.packing, start)
    raw_rows = start.row
    for batch in batches:
        with open(side_file, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in batch.unusable)
        cutter.add(batch.tokens, batch.lengths, batch.ordinals, *([] if batch.loss is None else [batch.loss]))
        writer.write_all(cutter.rows())
        raw_rows = max(raw_rows, batch.next_row)
        progress.update(batch)
    writer.write_all(cutter.rows(last=True))
    with open(side_file) as file:
        first = file.readline()
        skipped = bool(first) + sum(1 for _ in file)
    if not writer.rows:
        where = next(filter(None, map(manifest.source.get, ("path", "listed_in", "dataset"))))
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
