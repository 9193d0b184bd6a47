"""How a raw row becomes the text of one document. A format is a function from the row to text.

Chats, whose text a template decides, will be formats of their own kind beside these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cheaper.errors import UserError, did_you_mean

Row = Mapping[str, Any]


class UnusableRow(ValueError):  # noqa: N818  the row is at fault, not the program
    """The row cannot become a document; the message says why."""


def column(row: Row, name: str) -> str:
    """The text in one column."""
    if name not in row:
        raise UnusableRow(f"no column {name}, only {', '.join(map(str, row))}")
    if not isinstance(row[name], str):
        raise UnusableRow(f"column {name} holds {type(row[name]).__name__}, expected text")
    return row[name]


def natural_reasoning(row: Row) -> str:
    """``facebook/natural_reasoning``: the question and its first response."""
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses or not isinstance(responses[0], Mapping):
        raise UnusableRow("column responses holds no response")
    return f"{column(row, 'question')}\n\n{column(responses[0], 'response')}"


def nemotron_post_training(row: Row) -> str:
    """``nvidia/Llama-Nemotron-Post-Training-Dataset``: the messages of ``input``, then ``output``."""
    messages = row.get("input")
    if isinstance(messages, str):
        messages = [{"content": messages}]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise UnusableRow("column input holds no messages")
    return "\n\n".join([*(column(message, "content") for message in messages), column(row, "output")])


FORMATS: dict[str, Callable[[Row], str]] = {
    "natural_reasoning": natural_reasoning,
    "nemotron_post_training": nemotron_post_training,
}


def get_format(name: str, field: str) -> Callable[[Row], str]:
    """The format called ``name``; ``text`` reads the column ``field``.

    Raises:
        UserError: There is no such format.
    """
    if name == "text":
        return lambda row: column(row, field)
    if name not in FORMATS:
        raise UserError(f"format {name}: no such format{did_you_mean(name, ['text', *FORMATS])}")
    return FORMATS[name]
