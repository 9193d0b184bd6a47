"""Rows of tokens from MDS shards: of one stream as they lie there, or of several streams mixed.

A row of the shards may be as long as several rows of a training, and is cut into them here: what streaming calls a
sample is a row of the training.
"""

from __future__ import annotations

import bisect
import os
import struct
from typing import Any

import numpy as np
import streaming.base.dataset
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.dataset import _ShardState
from streaming.base.format import MDSReader
from streaming.base.partition import get_partitions
from streaming.base.world import World

from cheaper.config import DataConfig
from cheaper.data.manifest import Manifest
from cheaper.data.mixing import Mixture
from cheaper.data.rows import cut_row
from cheaper.data.teacher_cache import decode_row

MIXED = "mixed"


class TokenStream(Stream):
    """The shards of one stream.

    Args:
        data: Says where they are.
        name: Of the stream.
        manifest: Of its shards, as the training sees them.
    """

    def __init__(self, data: DataConfig, name: str, manifest: Manifest):
        folder = f"{data.root}/{name}"
        remote = {"remote": folder, "local": f"{data.cache}/{data.name}/{name}"}
        super().__init__(**(remote if "://" in folder else {"local": folder}))
        self.manifest = manifest

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Any]:
        """Streaming's readers of whole rows, which say how many rows of the training they have."""
        shards, manifest = super().get_shards(world, allow_unsafe_types), self.manifest
        for shard in shards:
            shard.__class__ = RowReader  # streaming leaves no choice of it
            for columns in ("column_encodings", "column_names", "column_sizes"):  # one list for 100,000 shards
                setattr(shard, columns, getattr(shards[0], columns))
        if manifest.cuts > 1:
            ends = np.cumsum([shard.samples for shard in shards])
            for shard in shards:
                shard.samples *= manifest.cuts
            for (rows, tokens), end in zip(manifest.parts, np.cumsum(manifest.parts, axis=0)[:, 0], strict=True):
                shards[np.searchsorted(ends, end)].samples -= rows * manifest.cuts + -tokens // manifest.sequence_length
        return shards


class RowReader(MDSReader):
    """Streaming's reader of a shard, with a third of the time to read a row: arrays are views of what was read."""

    def get_sample_data(self, idx: int) -> bytes:
        """The bytes of row ``idx``, whose borders stand at the beginning of the file."""
        file = os.open(f"{self.dirname}/{self.split}/{self.raw_data.basename}", os.O_RDONLY)
        try:
            begin, end = struct.unpack("<2I", os.pread(file, 8, 4 + 4 * idx))
            return os.pread(file, end - begin, begin)
        finally:
            os.close(file)

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """The columns of a row; arrays of one axis, read-only, and bytes."""
        sizes = np.frombuffer(data, np.uint32, len(self.column_names)).tolist()
        row, begin = {}, 4 * len(sizes)
        for name, encoding, size in zip(self.column_names, self.column_encodings, sizes, strict=True):
            kind, _, dtype = encoding.partition(":")
            if kind == "ndarray":
                head = 1 + 2 ** (data[begin] % 4)  # a byte that says how wide the length is, and the length
                row[name] = np.frombuffer(memoryview(data)[begin + head : begin + size], dtype)
            else:
                row[name] = data[begin : begin + size]
            begin += size
        return row


class TokenDataset(StreamingDataset):
    """Rows of tokens; each knows its stream and its number.

    Args:
        streams: Where they are.
        shares: Of each stream, of all rows: they come in the order of a ``Mixture``, ``epoch_size`` in each of
            streaming's epochs. Without them every row comes once, as it lies in the shards.
        arguments: Streaming's.
    """

    def __init__(self, streams: list[TokenStream], shares: list[float] | None = None, **arguments: Any):
        super().__init__(streams=streams, **arguments)
        self.manifests = [stream.manifest for stream in streams]
        self.spanner.cuts = np.repeat([m.cuts for m in self.manifests], self.shards_per_stream).tolist()
        if shares:
            shards = np.split(self.samples_per_shard, self.shard_offset_per_stream[1:])
            self.mixture = Mixture(shares, shards, self.shuffle_seed, self.shuffle)
            self.batching_method = MIXED  # the constructor takes only streaming's own

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetches a shard that is not here."""
        # The thread that looks ahead asks without blocking, for every row; streaming would lock a file each time.
        if blocking or self._shard_states[shard_id] != _ShardState.LOCAL:
            super().prepare_shard(shard_id, blocking)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        row = super().get_item(sample_id, retry)
        shard, place = self.spanner.find(sample_id)
        stream = int(self.stream_per_shard[shard])
        manifest = self.manifests[stream]
        if manifest.cuts > 1:
            row = cut_row(row, place % manifest.cuts * manifest.sequence_length, manifest.sequence_length)
        if manifest.teacher:
            row["teacher"] = decode_row(row["teacher"], len(row["input_ids"]), manifest.teacher)
        return {**row, "sample": int(sample_id), "stream": stream}


class RowFinder:
    """In which shard a row is. Streaming's ``Spanner`` keeps a number for every row while it is made.

    Args:
        shard_sizes: Rows of each shard.
    """

    def __init__(self, shard_sizes: NDArray[np.int64]):
        self.ends = shard_sizes.cumsum().tolist()
        self.cuts = [1] * len(self.ends)  # rows that each row of a shard is cut into

    def find(self, row: int) -> tuple[int, int]:
        """The shard of ``row`` and its place among the shard's rows."""
        row = int(row)
        shard = bisect.bisect_right(self.ends, row)
        return shard, row - (self.ends[shard - 1] if shard else 0)

    def __getitem__(self, row: int) -> tuple[int, int]:
        """The shard of ``row`` and which of the rows that lie there it is or is cut from."""
        shard, place = self.find(row)
        return shard, place // self.cuts[shard]


def order_mixed(dataset: TokenDataset, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """One epoch's rows for streaming: [nodes, ranks, workers, batches, rows] int64, -1 for none.

    The order over all ranks depends on the mixture and ``num_canonical_nodes`` only, not on how many nodes, ranks and
    workers share it.
    """
    rows = dataset.mixture.rows(epoch * dataset.epoch_size, (epoch + 1) * dataset.epoch_size)
    places = get_partitions(
        dataset.partition_algo,
        dataset.epoch_size,
        dataset.num_canonical_nodes,
        world.num_nodes,
        world.ranks_per_node,
        world.workers_per_rank,
        dataset.batch_size,
        sample_in_epoch,
        dataset.initial_physical_nodes,
    )
    return np.where(places != -1, rows[places], -1)


# Streaming looks both up here by name.
batching_methods[MIXED] = order_mixed
streaming.base.dataset.Spanner = RowFinder
