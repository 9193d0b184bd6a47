"""The order of a mixture: an endless sequence of rows in which every stream always has its share.

Row j of a stream with share r of all rows stands at place (j + u) / r, with one random u in [0, 1) per stream: after
any number of rows every stream is within a few rows of its share. A stream is passed over again and again, and in each
pass every row comes exactly once, in another order. The order depends on the seed only, not on how many processes share
it.

Any piece of the sequence is made on its own, in memory of the piece's size: two trillion tokens are a billion rows.
Streaming's own ``random`` batching needs all of them at once, shuffles all shards together, so that a stream of few
large shards comes early or late, and draws a part of a stream anew in each epoch instead of going on in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHUFFLED_TOGETHER = 1 << 18  # rows of a stream; their shards are in use at the same time


class Mixture:
    """Which row of which stream comes when.

    Args:
        shares: Of each stream, of all rows; any positive numbers.
        shards: Rows in each shard of each stream. Rows are numbered through shards and streams.
        seed: Of the streams' offsets and of the shuffle.
        shuffle: Whether a pass over a stream takes its rows in random order, or as they are.
    """

    def __init__(self, shares: Sequence[float], shards: Sequence[NDArray[np.int64]], seed: int, shuffle: bool):
        self.shares = np.array(shares, np.float64) / sum(shares)
        self.shards, self.seed, self.shuffle = shards, seed, shuffle
        self.sizes = [int(rows.sum()) for rows in shards]
        self.first_rows = np.cumsum([0, *self.sizes]).tolist()
        self.offsets = np.random.default_rng(seed).random(len(shards))

    def rows(self, begin: int, end: int) -> NDArray[np.int64]:
        """The rows from place ``begin`` to ``end`` of the sequence, [end - begin] int64."""
        spans = list(zip(self.counts(begin).tolist(), self.counts(end).tolist(), strict=True))
        rows = np.concatenate([self.stream_rows(stream, *span) for stream, span in enumerate(spans)])
        places = [
            (np.arange(*span) + offset) / share
            for span, offset, share in zip(spans, self.offsets, self.shares, strict=True)
        ]
        return rows[np.argsort(np.concatenate(places), kind="stable")]  # which merges what is sorted already

    def counts(self, total: int) -> NDArray[np.int64]:
        """How many rows of each stream are among the first ``total``; int64."""
        low, high = 0.0, total + 1 / self.shares.min()
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if self._before(middle).sum() <= total else (low, middle)
        counts, more = self._before(low), self._before(high) - self._before(low)
        # Rows at one place: the first streams' come first.
        return counts + np.diff(np.minimum(more.cumsum(), total - counts.sum()), prepend=0)

    def _before(self, place: float) -> NDArray[np.int64]:
        return np.maximum(np.ceil(place * self.shares - self.offsets), 0).astype(np.int64)

    def stream_rows(self, stream: int, begin: int, end: int) -> NDArray[np.int64]:
        """Rows ``begin`` to ``end`` of the endless sequence of passes over ``stream``."""
        size, parts = self.sizes[stream], [np.empty(0, np.int64)]
        while begin < end:
            number, place = divmod(begin, size)
            stop = min(size, place + end - begin)
            parts.append(self._pass_rows(stream, number, place, stop))
            begin += stop - place
        return np.concatenate(parts) + self.first_rows[stream]

    def _pass_rows(self, stream: int, number: int, begin: int, end: int) -> NDArray[np.int64]:
        """Rows ``begin`` to ``end`` of one pass: shards in random order, and rows of neighbouring ones shuffled."""
        if not self.shuffle:
            return np.arange(begin, end)
        rows, seed = self.shards[stream], [self.seed, stream, number]
        order = np.random.default_rng(seed).permutation(len(rows))
        first_rows, sizes = (rows.cumsum() - rows)[order], rows[order]
        starts = sizes.cumsum() - sizes
        windows = starts // SHUFFLED_TOGETHER  # a shard belongs to the window in which it begins
        first, last = windows[np.searchsorted(starts, [begin, end - 1], side="right") - 1]
        parts = []
        for window in range(first, last + 1):
            inside = slice(*np.searchsorted(windows, [window, window + 1]))
            shuffled = ranges(first_rows[inside], sizes[inside])
            np.random.default_rng([*seed, window]).shuffle(shuffled)
            parts.append(shuffled)
        skipped = starts[np.searchsorted(windows, first)]
        return np.concatenate(parts)[begin - skipped : end - skipped]


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The whole numbers from each start on, so many each, end to end."""
    before = lengths.cumsum() - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
