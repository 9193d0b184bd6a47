"""The order of a mixture: at every moment the streams are consumed in the asked proportions.

Streaming's own ``random`` batching shuffles all shards together, so that a stream of few large shards comes early or
late; its ``stratified`` batching needs a row of every stream in every batch. Here each stream is shuffled on its own,
and the streams are interleaved evenly: after any number of rows every stream is within one row of its share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle
from streaming.base.world import World

EVENLY = "evenly"


def interleave(counts: Sequence[int], seed: int) -> NDArray[np.int64]:
    """The even order of several streams' rows.

    Row j of a stream of n rows stands at (j + u) / n of the way, with one random u in [0, 1) per stream.

    Args:
        counts: Rows of each stream.
        seed: For the streams' offsets.

    Returns:
        [sum of counts] int64: which of the streams' rows, laid end to end, comes at each place.
    """
    offsets = np.random.default_rng(seed).random(len(counts))
    places = [(np.arange(count) + offset) / count for count, offset in zip(counts, offsets, strict=True)]
    return np.argsort(np.concatenate(places), kind="stable")


def order_evenly(dataset: StreamingDataset, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """One epoch's sample ids for streaming: [nodes, ranks, workers, batches, rows], -1 for none.

    The order over all ranks depends on the seed, the epoch and ``num_canonical_nodes`` only, not on how many nodes,
    ranks and workers share it.
    """
    rows = []
    for stream in range(dataset.num_streams):
        shard_parts, sample_ids = dataset.resample_streams(epoch, stream)
        if dataset.shuffle:
            seed = dataset.shuffle_seed + stream  # streams of the same shape must not move in step
            nodes, block = dataset.num_canonical_nodes, dataset.shuffle_block_size
            sample_ids = sample_ids[get_shuffle(dataset.shuffle_algo, shard_parts, nodes, seed, epoch, block)]
        rows.append(sample_ids)
    ordered = np.concatenate(rows)[interleave([len(ids) for ids in rows], dataset.shuffle_seed + epoch)]
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
    return np.where(places != -1, ordered[places], -1)


batching_methods[EVENLY] = order_evenly  # streaming looks its batching methods up here by name
