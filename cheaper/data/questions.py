"""Questions that a dataset leaves to the datasets they came from, as ``nvidia/OpenCodeReasoning-2`` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cheaper.data.formats import UnusableRow
from cheaper.errors import UserError

if TYPE_CHECKING:
    import datasets

# By what the column ``dataset`` says. The first two are read file by file: their repositories hold loading scripts,
# which the library ``datasets`` runs no more.
PUBLISHED = {
    "taco": "hf://datasets/BAAI/TACO/ALL/{split}-*.parquet",
    "apps": "hf://datasets/codeparrot/apps/{split}.jsonl",
    "code_contests": "deepmind/code_contests",
    "open-r1/codeforces": "open-r1/codeforces",
}
COLUMNS = ("question", "description", "input_format", "output_format", "examples", "note")


class Questions:
    """Looks questions up by dataset, split and row. A dataset is opened when it is first needed, and memory-mapped.

    Args:
        tables: Where a dataset is, other than ``PUBLISHED``: a hub id, files such as ``raw/taco/{split}-*.parquet``, or
            a folder with ``<split>.jsonl`` or ``<split>.parquet``.
    """

    def __init__(self, tables: Mapping[str, str] | None = None):
        self.tables = {**PUBLISHED, **(tables or {})}
        self._opened: dict[tuple[str, str], datasets.Dataset] = {}

    def find(self, dataset: Any, split: Any, index: Any) -> str:
        """The question in row ``index`` of a split.

        Raises:
            UnusableRow: There is no such dataset or row, or it holds no question.
            UserError: The dataset cannot be read.
        """
        if not isinstance(dataset, str) or dataset not in self.tables:
            raise UnusableRow(f"its question is in dataset {dataset!r}, expected one of {', '.join(self.tables)}")
        if not isinstance(split, str) or not split.isidentifier():  # it becomes a part of a path
            raise UnusableRow(f"its question is in split {split!r} of {dataset}, which is no name of a split")
        if (dataset, split) not in self._opened:
            self._opened[dataset, split] = _open(dataset, self.tables[dataset], split)
        table = self._opened[dataset, split]
        if not str(index).isdecimal() or int(index) >= len(table):
            raise UnusableRow(f"its question is row {index!r} of {dataset}, split {split}, which has {len(table)} rows")
        question = compose_question(table[int(index)])
        if not question:
            raise UnusableRow(f"row {index} of {dataset}, split {split}, holds no question")
        return question


def compose_question(row: Mapping[str, Any]) -> str:
    """The text of a question, put together as the data card of OpenCodeReasoning-2 does, empty if there is none.

    Args:
        row: TACO's and APPS's have ``question``, CodeContests' and Codeforces' ``description``, Codeforces' moreover
            ``input_format``, ``output_format``, ``examples`` and ``note``, each of which may be empty.
    """
    text = row.get("question") or row.get("description")
    if not isinstance(text, str):
        return ""
    parts = [text]
    for title, key in (("Input", "input_format"), ("Output", "output_format")):
        parts += [title, row[key]] if row.get(key) else []
    parts += ["Examples"] if row.get("examples") else []
    for example in row.get("examples") or ():
        for title, key in (("Input", "input"), ("Output", "output")):
            parts += [title, example[key]] if example.get(key) is not None else []
    parts += ["Note", row["note"]] if row.get("note") else []
    return "\n\n".join(parts)


def _open(dataset: str, source: str, split: str) -> datasets.Dataset:
    import datasets  # slow to import, and only needed here

    pattern = source
    if Path(source).is_dir():
        files = [path for ending in ("jsonl", "parquet") if (path := Path(source, f"{split}.{ending}")).is_file()]
        if not files:
            raise UserError(f"questions of {dataset}: folder {source} holds no {split}.jsonl and no {split}.parquet")
        pattern = str(files[0])
    elif "{split}" in source:
        pattern = source.replace("{split}", split)
    try:
        if pattern != source:
            kind = "parquet" if pattern.endswith(".parquet") else "json"
            table = datasets.load_dataset(kind, data_files=pattern, split="train")
        else:
            table = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"questions of {dataset}: {pattern}, split {split}, cannot be read ({reason})") from None
    # A row is decoded whole, and what these datasets also hold, tests and solutions, is a thousand times as much.
    return table.select_columns([name for name in COLUMNS if name in table.column_names])
