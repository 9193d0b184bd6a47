"""Rows of shards as a person reads them: the text, where documents end, and which of it has loss."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cheaper.data.tokenize import Tokenizer
from cheaper.errors import UserError

BORDER = "──── document ────"
# What a terminal would obey: control characters but tab and newline, and those that turn the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
RESET, LOSS, NO_LOSS, LINE = "\x1b[0m", "\x1b[32m", "\x1b[90m", "\x1b[7m"


def inspect_rows(folder: Path, tokenizer: Tokenizer, first: int, count: int, colour: bool) -> Iterator[str]:
    """Decodes rows of a folder of shards; a row is a line about it, then its text.

    Text with loss is green, other text grey, and a line stands between two documents; without colour, text with loss
    stands in ⟦ ⟧. Special tokens are spelled out, and bytes that are no text are shown as �.

    Args:
        folder: A stream's shards, with their ``index.json``.
        tokenizer: That which they were made with.
        first: The first row to show, from 0.
        count: How many rows to show at most.
        colour: For a terminal that understands ANSI's colours.

    Raises:
        UserError: The folder holds no such rows, or they are of another tokenizer.
    """
    from streaming import LocalDataset  # slow to import, and only needed here

    if not (Path(folder) / "index.json").is_file():
        raise UserError(f"{folder} holds no index.json: no folder of shards, or its conversion is not finished")
    try:
        rows = LocalDataset(str(folder))
        for shard in rows.shards:
            shard.validate(allow_unsafe_types=False)  # a pickled column would run what it holds
        columns = set(rows.shards[0].column_names) if rows.shards else set()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/index.json is no index of MDS shards ({error})") from None
    if "input_ids" not in columns:
        raise UserError(f"{folder} holds no rows of tokens; its columns are {', '.join(sorted(columns)) or 'none'}")
    if not 0 <= first < len(rows):
        raise UserError(f"{folder} has {len(rows)} rows, numbered from 0; there is no row {first}")
    return _rows(rows, folder, tokenizer, range(first, min(first + count, len(rows))), colour)


def _rows(rows: Any, folder: Path, tokenizer: Tokenizer, numbers: range, colour: bool) -> Iterator[str]:
    for number in numbers:
        try:
            row = rows[number]
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{folder}: row {number} cannot be read ({error})") from None
        if len(row["input_ids"]) and row["input_ids"].max() >= tokenizer.vocab_size:
            words = f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} words"
            raise UserError(f"{folder}: row {number} has token {row['input_ids'].max()}, {words}")
        for key in ("lengths", "loss_lengths"):
            if key in row and row[key].sum(dtype=np.int64) != len(row["input_ids"]):
                raise UserError(f"{folder}: {key} of row {number} do not add up to its {len(row['input_ids'])} tokens")
        yield show_row(number, row, tokenizer, colour)


def show_row(number: int, row: dict[str, np.ndarray], tokenizer: Tokenizer, colour: bool) -> str:
    """One row as text, see ``inspect_rows``."""
    ids = row["input_ids"]
    lengths = row.get("lengths", np.array([len(ids)])).astype(np.int64)
    runs = row.get("loss_lengths", np.array([0, len(ids)])).astype(np.int64)  # without loss, with, without, …
    has_loss = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    documents = []
    for begin, end in zip(lengths.cumsum() - lengths, lengths.cumsum(), strict=True):
        changes = 1 + np.flatnonzero(np.diff(has_loss[begin:end]))
        parts = zip(np.split(ids[begin:end], changes), np.split(has_loss[begin:end], changes), strict=True)
        documents.append("".join(_part(tokenizer.decode(part.tolist()), loss.any(), colour) for part, loss in parts))
    border = f"\n{LINE}{BORDER}{RESET}\n" if colour else f"\n{BORDER}\n"
    about = f"row {number}: {len(ids):,} tokens, {int(has_loss.sum()):,} with loss, {len(lengths)} documents"
    return f"{about}\n{border.join(documents)}"


def _part(text: str, loss: bool, colour: bool) -> str:
    text = CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    if colour:
        return f"{LOSS if loss else NO_LOSS}{text}{RESET}"
    return f"⟦{text}⟧" if loss else text
