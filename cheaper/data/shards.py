"""Rows of tokens as MDS shards, here or uploaded, with a manifest that always says where to go on."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cheaper.data.manifest import MANIFEST, Manifest
from cheaper.data.rows import Position, Row
from cheaper.errors import UserError

SHARD_BYTES = 1 << 26


def narrowest(values: int) -> np.dtype:
    """The narrowest of uint8, uint16 and uint32 that holds 0 … ``values`` - 1."""
    return np.min_scalar_type(values - 1)


class ShardWriter:
    """Writes rows as MDS shards, and after each shard the manifest that says where the next begins.

    Args:
        folder: Where the shards go.
        remote: Where streaming uploads them to; each is removed from ``folder`` once it is there.
        manifest: Of the shards so far; kept up to date.
    """

    def __init__(self, folder: Path, remote: str | None, manifest: Manifest):
        from streaming import MDSWriter  # slow to import, and the workers need none of it

        self.folder, self.manifest = folder, manifest
        dtype, length_dtype = narrowest(manifest.vocab_size), narrowest(manifest.sequence_length + 1)
        self.dtypes = {"input_ids": dtype, "lengths": length_dtype}
        if manifest.chat_template:
            self.dtypes["loss_lengths"] = length_dtype
        columns = {name: f"ndarray:{dtype}" for name, dtype in self.dtypes.items()}
        with tempfile.TemporaryDirectory() as empty:  # streaming takes no folder that holds shards already
            try:
                self.mds = MDSWriter(out=(empty, remote) if remote else empty, columns=columns, size_limit=SHARD_BYTES)
            except Exception as error:  # of a storage library
                raise UserError(f"data.root: {remote or folder} cannot be written ({one_line(error)})") from None
        self.mds.local = self.mds.cloud_writer.local = str(folder)
        self.mds.shards = list(manifest.shards)
        self.rows, self.tokens = manifest.rows, manifest.tokens
        if remote:  # what a killed conversion had not uploaded yet
            for shard in self.mds.shards:
                if (folder / shard["raw_data"]["basename"]).exists():
                    self._upload(shard["raw_data"]["basename"])

    def write_all(self, rows: Iterable[tuple[Row | None, Position | None]]) -> None:
        """Adds rows, each with where it begins; no row means that a shard ends here, no place that none can yet."""
        for row, begin in rows:
            if row is None:
                self._close_shard(begin)
            else:
                self._write(row, begin)

    def _write(self, row: Row, begin: Position | None) -> None:
        shards = len(self.mds.shards)
        self._check_uploads()
        self.mds.write({name: row[name].astype(dtype, copy=False) for name, dtype in self.dtypes.items()})
        if len(self.mds.shards) > shards and begin:  # streaming closed a shard; this row is the first of the next
            self._keep(begin)
        self.rows += 1
        self.tokens += len(row["input_ids"])

    def _close_shard(self, end: Position) -> None:
        if self.mds.new_samples:
            self.mds.flush_shard()
            self.mds._reset_cache()
        self._keep(end)

    def finish(self, end: Position, skipped: int) -> None:
        """Ends the stream: writes the index and, last of all, the manifest."""
        self._close_shard(end)
        # MDSWriter.finish would also delete the folder after an upload, and with it the manifest.
        self.mds._write_index()
        self.mds.executor.shutdown(wait=True)
        self._check_uploads()
        self.manifest.complete, self.manifest.skipped, self.manifest.shards = True, skipped, []
        if self.mds.remote:
            with tempfile.TemporaryDirectory() as temporary:  # an upload removes its file
                self.manifest.write(Path(temporary, MANIFEST))
                self.mds.cloud_writer.local = temporary
                self._upload(MANIFEST)
        self.manifest.write(self.folder / MANIFEST)

    def _upload(self, name: str) -> None:
        try:
            self.mds.cloud_writer.upload_file(name)
        except Exception as error:  # of a storage library
            raise self._upload_failed(one_line(error)) from None

    def _check_uploads(self) -> None:
        if self.mds.event.is_set():  # streaming has logged why
            self.mds.cancel_future_jobs()
            raise self._upload_failed("see above")

    def _upload_failed(self, reason: str) -> UserError:
        return UserError(f"an upload to {self.mds.remote} failed ({reason}); the same command goes on from here")

    def _keep(self, position: Position) -> None:
        newest = self.folder / self.mds.shards[-1]["raw_data"]["basename"]
        with contextlib.suppress(FileNotFoundError), open(newest, "rb+") as file:  # it may be uploaded already
            os.fsync(file.fileno())
        self.manifest.rows, self.manifest.tokens = self.rows, self.tokens
        self.manifest.next_row, self.manifest.next_token = position.row, position.token
        self.manifest.held = [list(pair) for pair in position.held]
        self.manifest.documents, self.manifest.shards = position.documents, self.mds.shards
        self.manifest.write(self.folder / MANIFEST)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
