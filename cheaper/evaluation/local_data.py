"""The data sets of benchmarks, from local copies or from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as parquet

from cheaper.errors import UserError

FORMATS = (".jsonl", ".parquet")


@contextmanager
def benchmark_data(folder: Path | None) -> Iterator[None]:
    """Tasks of the harness that are made in here read the data sets in ``folder``, or the hub's without one.

    A copy has the public set's own columns and lies at ``folder/<owner>/<name>[/<configuration>]/<split>`` with
    ``.jsonl`` or ``.parquet``.

    Raises:
        UserError: A data set is not there, or the hub is out of reach.
    """
    from_hub = datasets.load_dataset

    def load(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        if folder is None:
            return _download(from_hub, path, name, split=split, **options)
        found = LocalDataset.read(folder / path / (name if name and name != "default" else ""))
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
    def read(cls, folder: Path) -> LocalDataset:
        """Reads all splits in ``folder``.

        Raises:
            UserError: There are none, or a file is broken.
        """
        files = sorted(path for path in folder.glob("*") if path.suffix in FORMATS)
        if not files:
            raise UserError(f"--data_dir: there is no {folder}/<split>{' or '.join(FORMATS)}, a copy of the data set")
        splits = cls({path.stem: datasets.Dataset.from_list(_rows(path)) for path in files})
        splits.folder = folder
        return splits

    def __missing__(self, split: str) -> None:
        raise UserError(f"--data_dir: there is no {self.folder / split}{' or '.join(FORMATS)}, a split of the data set")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--data_dir: {path} cannot be read ({' '.join(str(error).split())[:120]})") from None


def _download(from_hub: Any, path: str, name: str | None, **options: Any) -> Any:
    try:
        return from_hub(path=path, name=name, **options)
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(f"data set {path}: not from the hub ({why}); name local copies with --data_dir") from None
