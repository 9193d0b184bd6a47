"""Raw rows, read as a stream: JSONL (plain, gz, zst, bz2), Parquet and text, here or at a URL; Hugging Face datasets.

Rows leave here undecoded where decoding costs something (a line of JSON stays bytes), because this runs in one process
and what follows in many.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from fsspec.core import url_to_fs

from cheaper.config import SourceConfig
from cheaper.data.formats import UnusableRow
from cheaper.errors import UserError

OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "": lambda file: file,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".zst": lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True),
}
JSONL = (".jsonl", ".ndjson", ".json")
TEXT = (".txt", ".text", ".md", ".rst")
KNOWN = (*(kind + compression for kind in JSONL for compression in OPENERS), ".parquet", *TEXT)
KINDS = f"{', '.join(JSONL)} (plain, .gz, .zst or .bz2), .parquet, {', '.join(TEXT)}"


@dataclass(frozen=True)
class RawRow:
    """One row as it was read."""

    content: bytes | dict[str, Any]  # a line of JSON, a text file (``is_text``), or columns
    file: str
    number: int  # within the file, from 0
    is_text: bool = False

    def parse(self) -> dict[str, Any]:
        """The row's columns; a text file has one, ``text``.

        Raises:
            UnusableRow: It is not valid UTF-8, or not a JSON object.
        """
        if isinstance(self.content, dict):
            return self.content
        try:
            text = self.content.decode("utf-8")
            row = {"text": text} if self.is_text else json.loads(text)
        except UnicodeDecodeError as error:
            raise UnusableRow(f"invalid UTF-8 at byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise UnusableRow(f"invalid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UnusableRow(f"a JSON {type(row).__name__}, expected an object")
        return row


class Source:
    """The rows of one stream, always in the same order.

    Args:
        config: Files (one, a folder, a glob, a list) or a Hugging Face dataset.
        name: The key of the stream, for messages.
        part: Which of the files to read, in their order.

    Raises:
        UserError: There is nothing to read.
    """

    def __init__(self, config: SourceConfig, name: str, part: slice = slice(None)):
        if [config.path, config.listed_in, config.dataset].count(None) != 2:
            raise UserError(f"data.streams.{name}.source: expected exactly one of path, listed_in and dataset")
        self.config, self.name = config, name
        files = _listed(config.listed_in, name) if config.listed_in else []
        self.files = (_files(config.path, name) if config.path else files)[part]
        self.total_bytes = sum(map(self._size, self.files)) or None
        self._read_before = 0
        self._open: BinaryIO | None = None

    def bytes_read(self) -> int:
        """How far reading has come, in bytes of the files as they lie on the disk."""
        return self._read_before + (self._open.tell() if self._open and not self._open.closed else 0)

    def __iter__(self) -> Iterator[RawRow]:
        if self.config.dataset:
            yield from self._dataset_rows()
        for file in self.files:
            if file.endswith(".parquet"):
                yield from self._parquet_rows(file)
            elif file.endswith(TEXT):
                yield self._text(file)
            else:
                yield from self._lines(file)
            self._read_before, self._open = self._read_before + self._size(file), None

    def _lines(self, file: str) -> Iterator[RawRow]:
        compression = next((suffix for suffix in OPENERS if suffix and file.endswith(suffix)), "")
        try:
            with open_file(file) as self._open:
                stream = _buffered(OPENERS[compression](self._open))
                if b"\0" in stream.peek(4096)[:4096]:
                    raise UserError(f"data.streams.{self.name}: {file} is a binary file, expected lines of JSON")
                for number, line in enumerate(stream):
                    if not line.isspace():
                        yield RawRow(line, file, number)
        except UserError:
            raise
        except Exception as error:  # of the file system, a decompressor or a library for URLs
            raise self._unreadable(file, error) from None

    def _text(self, file: str) -> RawRow:
        try:
            with open_file(file) as opened:
                return RawRow(opened.read(), file, 0, is_text=True)
        except Exception as error:  # of the file system or a library for URLs
            raise self._unreadable(file, error) from None

    def _size(self, file: str) -> int:
        try:
            return file_size(file)
        except Exception as error:  # of the file system or a library for URLs
            raise self._unreadable(file, error) from None

    def _unreadable(self, file: str, error: Exception) -> UserError:
        return UserError(f"data.streams.{self.name}: {file} cannot be read to its end ({_reason(error)})")

    def _parquet_rows(self, file: str) -> Iterator[RawRow]:
        import pyarrow.parquet

        try:
            number = 0
            with open_file(file) as opened:
                for batch in pyarrow.parquet.ParquetFile(opened).iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        yield RawRow(row, file, number)
                        number += 1
        except Exception as error:  # of Arrow, the file system or a library for URLs
            told = f"{file} is not a whole Parquet file ({_reason(error)})"
            raise UserError(f"data.streams.{self.name}: {told}") from None

    def _dataset_rows(self) -> Iterator[RawRow]:
        import datasets

        config = self.config
        try:
            rows = datasets.load_dataset(
                config.dataset, config.subset, data_dir=config.data_dir, split=config.split, streaming=True
            )
            for number, row in enumerate(rows):
                yield RawRow(row, config.dataset, number)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = _reason(error)
            if "scripts are no longer supported" in reason:
                reason += "; name its files instead: source.path=hf://datasets/…"
            raise UserError(f"data.streams.{self.name}: dataset {config.dataset} cannot be read ({reason})") from None


def _buffered(stream: BinaryIO) -> io.BufferedReader:
    """``stream`` with fast lines and a look ahead."""

    return stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, 1 << 20)


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]


def open_file(file: str) -> BinaryIO:
    """A file on this machine or at a URL, to read."""
    if "://" not in file:
        return open(file, "rb")
    file_system, path = url_to_fs(file)
    return file_system.open(path, "rb")


def file_size(file: str) -> int:
    """Bytes of a file on this machine or at a URL; 0 where a server does not say."""
    if "://" not in file:
        return os.path.getsize(file)
    file_system, path = url_to_fs(file)
    return file_system.size(path) or 0


def _listed(path: str, name: str) -> list[str]:
    """The files that a text file names, in its order."""
    try:
        with open_file(path) as opened:
            lines = opened.read().decode().splitlines()
    except Exception as error:  # of the file system or a library for URLs
        raise UserError(f"data.streams.{name}: {path} cannot be read ({_reason(error)})") from None
    return [file for line in lines if line.strip() for file in _files(line.strip(), name)]


def _matching(pattern: str, name: str) -> list[str]:
    """The files at a path, URL or glob, sorted."""
    if "://" not in pattern:
        return sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
    if not glob.has_magic(pattern):
        return [pattern]
    try:
        file_system, path = url_to_fs(pattern)
        return sorted(map(file_system.unstrip_protocol, file_system.glob(path)))
    except Exception as error:  # of a library for URLs
        raise UserError(f"data.streams.{name}: {pattern} cannot be listed ({_reason(error)})") from None


def _files(pattern: str, name: str) -> list[str]:
    """The files at a path, URL or glob, sorted; below a folder those of a known kind."""
    path = Path(pattern)
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.is_file() and file.name.endswith(KNOWN))
        if not files:
            raise UserError(f"data.streams.{name}: folder {pattern} holds no file of a known kind: {KINDS}")
        return files
    files = _matching(pattern, name)
    if not files:
        raise UserError(f"data.streams.{name}: there is no {pattern}")
    for file in files:
        if not file.endswith(KNOWN):
            raise UserError(f"data.streams.{name}: {file} is of no known kind: {KINDS}")
    return files
