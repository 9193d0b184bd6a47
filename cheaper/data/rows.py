"""Documents joined and cut into rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Position:
    """Where a row begins: in which raw row, at which of its tokens, after how many documents."""

    row: int
    token: int
    documents: int


class RowCutter:
    """Joins documents and cuts them into rows, knowing where each begins.

    Args:
        length: Tokens per row.
        start: Where the first row begins.
    """

    def __init__(self, length: int, start: Position):
        self.length = length
        self.tokens: np.ndarray | None = None  # those of no row yet
        self.lengths = np.empty(0, np.int64)  # of the documents in ``tokens``
        self.ordinals = np.empty(0, np.int64)  # their raw rows
        self.cut_off = 0  # tokens of the first document that are in earlier rows
        self.documents = start.documents  # those behind
        self._skip = start.token

    def add(self, tokens: np.ndarray, lengths: np.ndarray, ordinals: np.ndarray) -> None:
        """Takes documents: their tokens end to end, how many each has, and which raw row each is."""
        self.tokens = tokens if self.tokens is None else np.concatenate([self.tokens, tokens])
        self.lengths = np.concatenate([self.lengths, lengths])
        self.ordinals = np.concatenate([self.ordinals, ordinals])
        if self._skip and len(self.lengths):
            self.tokens, self.cut_off, self._skip = self.tokens[self._skip :], self._skip, 0
            self.lengths[0] -= self.cut_off

    def rows(self, last: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray, Position]]:
        """Yields the whole rows, and with ``last`` what is left: tokens, lengths of the pieces, where it begins."""
        ends = np.cumsum(self.lengths)
        total = 0 if self.tokens is None else len(self.tokens)
        stop = total if last else total - total % self.length
        for begin in range(0, stop, self.length):
            end = min(begin + self.length, total)
            first, behind = np.searchsorted(ends, [begin, end - 1], side="right")
            lengths = np.diff([begin, *ends[first:behind], end])
            yield self.tokens[begin:end], lengths, self._position(ends, first, begin)
        if stop:
            first = int(np.searchsorted(ends, stop, side="right"))
            self.cut_off = self._position(ends, first, stop).token if first < len(ends) else 0
            self.tokens, self.lengths, self.ordinals = self.tokens[stop:], self.lengths[first:], self.ordinals[first:]
            if len(self.lengths):
                self.lengths[0] = ends[first] - stop
            self.documents += first

    def _position(self, ends: np.ndarray, document: int, token: int) -> Position:
        begin = ends[document] - self.lengths[document] - (0 if document else self.cut_off)
        return Position(int(self.ordinals[document]), int(token - begin), self.documents + int(document))
