"""Documents as rows of tokens: text is joined and cut, chats stay whole and share a row where they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from cheaper.data.pack import best_fit

WINDOW_TOKENS = 1 << 24  # that are packed together; bounds the memory
FULL = 0.9995  # of a packed row; less is packed once more with what comes next
ROUNDS = 32  # after which a chat is packed for good


@dataclass(frozen=True)
class Position:
    """Where a row begins: in which raw row, at which of its tokens, after how many documents."""

    row: int
    token: int
    documents: int
    held: tuple[tuple[int, int], ...] = ()  # raw rows before it that are in no row yet, and the rounds they have waited


# Columns of a row: input_ids, lengths (of the pieces of documents), and for chats loss_lengths (see ``run_lengths``).
Row = dict[str, np.ndarray]


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

    def rows(self, last: bool = False) -> Iterator[tuple[Row, Position]]:
        """Yields the whole rows, and with ``last`` what is left, each with where it begins."""
        ends = np.cumsum(self.lengths)
        total = 0 if self.tokens is None else len(self.tokens)
        stop = total if last else total - total % self.length
        for begin in range(0, stop, self.length):
            end = min(begin + self.length, total)
            first, behind = np.searchsorted(ends, [begin, end - 1], side="right")
            lengths = np.diff([begin, *ends[first:behind], end])
            yield {"input_ids": self.tokens[begin:end], "lengths": lengths}, self._position(ends, first, begin)
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


def cut_row(row: Row, begin: int, length: int) -> Row:
    """The part of a row of text from token ``begin`` on, ``length`` tokens or what there is."""
    tokens = row["input_ids"][begin : begin + length]
    ends = row["lengths"].cumsum(dtype=np.int64).clip(begin, begin + len(tokens))
    lengths = np.diff(ends, prepend=begin)
    return {**row, "input_ids": tokens, "lengths": lengths[lengths > 0].astype(row["lengths"].dtype)}


@dataclass(frozen=True)
class _Chat:
    ordinal: int
    tokens: np.ndarray
    loss: np.ndarray
    rounds: int = 0


class ChatRows:
    """Rows of whole chats: one in each row, or as many as fit.

    Packing goes in rounds: it waits for a window of chats, fills rows best-fit, and gives out those that are full; the
    chats of the others wait for the next round, at most ``ROUNDS`` times.

    Args:
        length: Tokens of a row.
        packing: Several chats to a row.
        start: Where the first row begins.
    """

    def __init__(self, length: int, packing: bool, start: Position):
        self.length, self.packing, self.documents = length, packing, start.documents
        self._waited = dict(start.held)
        self._new: list[_Chat] = []
        self._waiting: list[_Chat] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray, ordinals: np.ndarray, loss: np.ndarray) -> None:
        """Takes chats: tokens and where they have loss end to end, how many each has, and which raw row each is."""
        ends = np.cumsum(lengths)
        for ordinal, begin, end in zip(ordinals.tolist(), ends - lengths, ends, strict=True):
            self._new.append(_Chat(ordinal, tokens[begin:end], loss[begin:end], self._waited.pop(ordinal, 0)))

    def rows(self, last: bool = False) -> Iterator[tuple[Row | None, Position | None]]:
        """Yields the rows that are ready, each with where it begins.

        A packed row begins nowhere. After those of a round comes no row, but where to go on.
        """
        new, self._new, waiting = self._new, [], sum(len(chat.tokens) for chat in self._waiting)
        for chat in new:
            if not self.packing:
                yield _row([chat]), Position(chat.ordinal, 0, self.documents)
                self.documents += 1
                continue
            # Rounds depend on the chats alone, not on how they come, so that who goes on makes the same rows: those
            # that have waited begin none.
            self._waiting.append(chat)
            waiting += len(chat.tokens)
            if waiting >= WINDOW_TOKENS and not chat.rounds:
                yield from ((row, None) for row in self._packed(last=False))
                held = tuple((waiter.ordinal, waiter.rounds) for waiter in self._waiting)
                yield None, Position(chat.ordinal + 1, 0, self.documents, held)
                waiting = sum(len(waiter.tokens) for waiter in self._waiting)
        if last and self._waiting:
            yield from ((row, None) for row in self._packed(last=True))

    def _packed(self, last: bool) -> Iterator[Row]:
        chats, self._waiting = self._waiting, []
        lengths = np.array([len(chat.tokens) for chat in chats], np.int64)
        for places in best_fit(lengths, self.length):
            together = [chats[place] for place in places]
            old = any(chat.rounds == ROUNDS for chat in together)
            if last or old or lengths[places].sum() >= FULL * self.length:
                self.documents += len(together)
                yield _row(together)
            else:
                self._waiting += [replace(chat, rounds=chat.rounds + 1) for chat in together]
        self._waiting.sort(key=lambda chat: chat.ordinal)


def _row(chats: list[_Chat]) -> Row:
    return {
        "input_ids": np.concatenate([chat.tokens for chat in chats]),
        "lengths": np.array([len(chat.tokens) for chat in chats]),
        "loss_lengths": run_lengths(np.concatenate([chat.loss for chat in chats])),
    }


def run_lengths(flags: np.ndarray) -> np.ndarray:
    """Lengths of the runs in ``flags`` (bool [T]), which alternate: the first is of False, and may be 0."""
    borders = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    lengths = np.diff([0, *borders, len(flags)])
    return np.array([0, *lengths]) if flags[:1].any() else lengths
