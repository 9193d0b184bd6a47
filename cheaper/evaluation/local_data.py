"""The data sets of benchmarks, from local copies or from the hub."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as parquet

from cheaper.errors import UserError

FORMATS = (".jsonl", ".parquet")
PART = re.compile(r"-\d{5}-of-(\d{5})$")  # as the hub names the files of a split

Files = dict[str, list[str]]  # of each split, where a data set is not told by its folder


@contextmanager
def benchmark_data(folder: Path | None) -> Iterator[None]:
    """Tasks of the harness that are made in here read the data sets in ``folder``, or the hub's without one.

    A copy has the public set's own columns and lies at ``folder/<owner>/<name>[/<configuration>]/<split>`` with
    ``.jsonl`` or ``.parquet``, or in parts ``<split>-00000-of-00001``. Files that a task names have the hub's names:
    LiveCodeBench's are ``livecodebench/code_generation_lite/test.jsonl`` and ``test2.jsonl`` to ``test6.jsonl``.

    Raises:
        UserError: A data set is not there, or the hub is out of reach.
    """
    from_hub = datasets.load_dataset

    def load(
        path: str, name: str | None = None, split: str | None = None, data_files: Files | None = None, **options: Any
    ) -> Any:
        if folder is None:
            return _download(from_hub, path, name, data_files, split=split, **options)
        found = LocalDataset.read(folder / path / (name if name and name != "default" else ""), data_files)
        return found[split] if split else found

    datasets.load_dataset = load  # the one door through which the harness gets data
    try:
        yield
    finally:
        datasets.load_dataset = from_hub


class LocalDataset(datasets.DatasetDict):
    """The splits of a local copy.

    Args:
        folder: Where they lie.
    """

    folder: Path

    @classmethod
    def read(cls, folder: Path, files: Files | None = None) -> LocalDataset:
        """Reads all splits in ``folder``, or ``files`` of it.

        Raises:
            UserError: There are none, or a file is missing or broken.
        """
        named = {split: [folder / name for name in names] for split, names in (files or {}).items()}
        splits = cls({split: _read(paths) for split, paths in (named or _splits(folder)).items()})
        splits.folder = folder
        return splits

    def __missing__(self, split: str) -> None:
        raise UserError(f"--data_dir: there is no {self.folder / split}{' or '.join(FORMATS)}, a split of the data set")


def _splits(folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*")):
        if path.suffix in FORMATS:
            splits[PART.sub("", path.stem)].append(path)
    if not splits:
        raise UserError(f"--data_dir: there is no {folder}/<split>{' or '.join(FORMATS)}, a copy of the data set")
    for split, paths in splits.items():
        part = PART.search(paths[0].stem)
        if len(paths) != (expected := int(part[1]) if part else 1):
            raise UserError(f"--data_dir: {folder} has {len(paths)} files of {split}; expected {expected}")
    return splits


def _read(paths: Sequence[Path]) -> datasets.Dataset:
    parts = []
    for path in paths:
        try:
            parts.append(datasets.Dataset.from_list(_rows(path)))
        except (OSError, ValueError, TypeError, AttributeError) as error:  # Arrow's, for columns of several types, too
            raise UserError(f"--data_dir: {path} cannot be read ({' '.join(str(error).split())[:120]})") from None
    return datasets.concatenate_datasets(parts)


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _download(from_hub: Any, path: str, name: str | None, files: Files | None, **options: Any) -> Any:
    asked = {"path": path, "name": name}
    if files:
        urls = {split: [f"hf://datasets/{path}/{file}" for file in names] for split, names in files.items()}
        asked = {"path": "json", "data_files": urls}
    try:
        return from_hub(**asked, **options)
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(f"data set {path}: not from the hub ({why}); name local copies with --data_dir") from None
