"""Best-fit packing: which documents share a row."""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Puts documents, the longest first, each into the row where it leaves the least room (best-fit decreasing).

    Rows are kept by their room, and a set of bits says which rooms there are, so that the search is one shift: a
    million documents take seconds.

    Args:
        lengths: int [N], 1 … ``capacity``.
        capacity: Tokens of a row.

    Returns:
        For each row the indexes of its documents, ascending. Documents of one length keep their order.

    Raises:
        ValueError: A document is empty or longer than a row.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths are {lengths.min()} … {lengths.max()}, expected 1 … {capacity}")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where by_room[r] has a row
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        if rest := room - length:
            by_room[rest].append(row)
            rooms |= 1 << rest
    return [sorted(row) for row in rows]
