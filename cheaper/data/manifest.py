"""``manifest.json`` beside the shards of a stream: what they were made from and how."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cheaper.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TeacherRecord:
    """Whose words a teacher cache keeps, and how, see ``cheaper.data.teacher_cache``."""

    kind: str  # top_k or sampled
    k: int
    precision: str  # compact or fp32
    name: str = ""
    fingerprint: str = ""
    temperature: float = 1.0
    words: int = 0  # over which the teacher's distribution is


@dataclass
class Manifest:
    """How a stream was converted (``made_from`` must agree to go on with it) and what came of it.

    Counts are of finished shards; ``next_row`` and ``next_token`` say where to go on: so many raw rows are behind, and
    so many tokens of the next one.
    """

    tokenizer_name: str
    tokenizer_fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    sequence_length: int
    source: dict[str, Any]
    format: str
    field: str
    chat_template: str | None = None  # fingerprint, of chats only
    packing: bool = False  # several chats to a row
    too_long: str | None = None  # what became of chats that do not fit a row
    source_bytes: int | None = None  # of all files when the conversion began
    version: int = FORMAT_VERSION
    complete: bool = False
    documents: int = 0
    rows: int = 0
    tokens: int = 0
    skipped: int = 0
    next_row: int = 0
    next_token: int = 0
    held: list[list[int]] = dataclasses.field(default_factory=list)  # such raw rows in no shard, and rounds waited
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # until complete; then index.json has them
    teacher: TeacherRecord | None = None  # of a teacher cache
    parts: list[list[int]] = dataclasses.field(default_factory=list)  # rows and tokens of each, if it has several
    cuts: int = 1  # rows of a training that each row of the shards is cut into, see ``cut_into``

    def cut_into(self, length: int) -> Manifest:
        """The manifest as a training on rows of ``length`` tokens sees it; text fills all rows but a part's last.

        Raises:
            ValueError: The rows cannot be cut so.
        """
        if length == self.sequence_length:
            return self
        if self.sequence_length % length or self.chat_template:
            raise ValueError(f"rows of {self.sequence_length} tokens, which cannot be cut into {length}")
        cuts, parts = self.sequence_length // length, self.parts or [[self.rows, self.tokens]]
        rows = sum(-(-tokens // length) for _, tokens in parts)
        return dataclasses.replace(self, sequence_length=length, rows=rows, parts=parts, cuts=cuts)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads a manifest.

        Raises:
            FileNotFoundError: There is none.
            UserError: It is not one of this version's.
        """
        try:
            raw = json.loads(path.read_text())
            if raw["version"] != FORMAT_VERSION:
                raise ValueError(f"version {raw['version']}, expected {FORMAT_VERSION}")
            teacher = TeacherRecord(**raw["teacher"]) if raw.get("teacher") else None
            return cls(**{**raw, "teacher": teacher})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a manifest of this version ({error})") from None

    def write(self, path: Path) -> None:
        """Replaces ``path`` in one step, so that a kill leaves the old or the new one."""
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "w") as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def made_from(self) -> dict[str, Any]:
        """What must be equal for two conversions to be the same."""
        names = ("tokenizer_fingerprint", "sequence_length", "source", "format", "field")
        names += ("chat_template", "packing", "too_long")
        given = {key: value for key, value in self.source.items() if value is not None}  # versions know other keys
        return {**{name: getattr(self, name) for name in names}, "source": given}
