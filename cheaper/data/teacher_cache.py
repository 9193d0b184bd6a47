"""What a teacher says of every token of a mixture, kept as one more column of its shards.

A cache is a folder of MDS shards per stream that hold the rows of the token shards, in their order, and beside each
row the column ``teacher``. Two kinds:

- ``top_k``: the k most likely words with their probabilities, and the mass of all others as one number.
- ``sampled``: k words drawn from the teacher's distribution, with how often each was drawn, which is an unbiased
  estimate of it ("Sparse Logit Sampling", Anshumann et al., ACL 2025), and the distribution's entropy.

Words are kept in ascending order as differences, bytes of the same weight side by side, and compressed with zstd.
Probabilities are rounded to steps of 1/8 in their logarithm (``compact``, which costs about 0.001 nats of KL) or kept
as they are (``fp32``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zstandard

from cheaper.data.manifest import TeacherRecord

STEP = 1 / 8  # of compact log-probabilities, in nats
NO_MASS = 255  # the compact code of probability 0


@dataclass(frozen=True)
class KeptRow:
    """What is kept of the teacher at each of the T tokens of a row; the fields of ``SparseTeacher`` as arrays."""

    ids: np.ndarray  # [T, K] int64
    probabilities: np.ndarray  # [T, K] fp32; 0 in places that are not used
    tail: np.ndarray | None  # [T] fp32, of the kind top_k
    entropy: np.ndarray | None  # [T] fp32, of the kind sampled
    most_likely: np.ndarray  # [T] int64


def encode_row(row: KeptRow, draws: int, compact: bool) -> bytes:
    """Packs a row; its words may come in any order, and those that were drawn more than once.

    Args:
        row: T tokens.
        draws: How many words were drawn for each token, of the kind ``sampled``.
        compact: Round the probabilities of ``top_k``.
    """
    order = np.argsort(row.ids, axis=1, kind="stable")
    ids, probabilities = (np.take_along_axis(x, order, 1) for x in (row.ids, row.probabilities))
    gaps = np.diff(ids, axis=1, prepend=0)
    first = gaps > 0  # of its word
    first[:, 0] = True
    parts = [first.sum(1).astype("<u4"), gaps[first].astype("<u4"), row.most_likely.astype("<u4")]
    if row.tail is None:
        times_drawn = np.add.reduceat(np.rint(probabilities * draws).ravel(), np.flatnonzero(first))
        parts += [times_drawn.astype("<u2"), row.entropy.astype("<f4")]
    elif compact:
        parts += [_to_code(probabilities[first]), _to_code(row.tail)]
    else:
        parts += [probabilities[first].astype("<f4"), row.tail.astype("<f4")]
    planes = [part.view(np.uint8).reshape(len(part), -1).T.tobytes() for part in parts]
    return zstandard.ZstdCompressor(level=9).compress(b"".join(planes))


def decode_row(content: bytes, tokens: int, record: TeacherRecord) -> KeptRow:
    """What ``encode_row`` packed, with the words of each token in ascending order and once.

    Args:
        content: Its result.
        tokens: T.
        record: How the cache was made.
    """
    buffer = _Planes(zstandard.ZstdDecompressor().decompress(content))
    counts = buffer.take("<u4", tokens).astype(np.int64)
    gaps = buffer.take("<u4", int(counts.sum())).astype(np.int64)
    most_likely = buffer.take("<u4", tokens).astype(np.int64)
    used = np.arange(counts.max(initial=0)) < counts[:, None]
    ids = np.zeros(used.shape, np.int64)
    ids[used] = gaps
    ids = np.where(used, ids.cumsum(1), 0)
    probabilities = np.zeros(used.shape, np.float32)
    if record.kind == "sampled":
        probabilities[used] = buffer.take("<u2", len(gaps)).astype(np.float32) / record.k
        return KeptRow(ids, probabilities, None, buffer.take("<f4", tokens), most_likely)
    if record.precision == "fp32":
        probabilities[used] = buffer.take("<f4", len(gaps))
        return KeptRow(ids, probabilities, buffer.take("<f4", tokens), None, most_likely)
    probabilities[used] = _from_code(buffer.take("u1", len(gaps)))
    tail = _from_code(buffer.take("u1", tokens))
    total = probabilities.sum(1) + tail  # rounding has left it near 1
    return KeptRow(ids, probabilities / total[:, None], tail / total, None, most_likely)


def _to_code(probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.rint(-np.log(probabilities) / STEP).clip(0, NO_MASS).astype("u1")


def _from_code(code: np.ndarray) -> np.ndarray:
    return np.where(code == NO_MASS, 0, np.exp(-STEP * code.astype(np.float32))).astype(np.float32)


class _Planes:
    """Reads arrays whose bytes of the same weight lie side by side."""

    def __init__(self, content: bytes):
        self.content, self.place = np.frombuffer(content, np.uint8), 0

    def take(self, dtype: str, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        planes = self.content[self.place : self.place + size].reshape(-1, count) if count else self.content[:0]
        self.place += size
        return np.ascontiguousarray(planes.T).view(dtype).reshape(count)
