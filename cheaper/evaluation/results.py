"""What a model scored: a table, and ``evaluation.json``."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cheaper
from cheaper.errors import UserError
from cheaper.files import write_atomically

PACKAGES = ("lm-eval", "torch", "transformers", "math-verify")


@dataclass(frozen=True)
class Result:
    """A model's score.

    Args:
        benchmark: As ``--benchmarks`` names it.
        metric: As the harness names it.
        shots: Examples before each question.
        samples: Questions that were asked.
        score: Share of 1, or what else the metric is.
        stderr: Standard error of the score, where there is one.
        expected: The specification's score for a model of this size.
        published: MobileLLM-R1's score at this size.
        settings: What else the score depends on: ``limit``, ``seed``, ``chat``, and of generated texts ``draws``,
            ``temperature`` and ``max_new_tokens``.
    """

    benchmark: str
    metric: str
    shots: int
    samples: int
    score: float
    stderr: float | None = None
    expected: float | None = None
    published: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def table(results: Sequence[Result]) -> str:
    """The results as text, one a line."""
    rows = [("benchmark", "metric", "shots", "n", "score", "expected", "published")]
    for result in results:
        score = _share(result.score) + (f" ± {_share(result.stderr)}" if result.stderr is not None else "")
        counts = (str(result.shots), f"{result.samples:,}")
        rows.append(
            (result.benchmark, result.metric, *counts, score, *map(_share, (result.expected, result.published)))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def results_file(model: str, source: Path) -> Path:
    """Where results go: into the run's folder or the folder of the weights; for a model of the hub, here."""
    folder = Path() if not Path(model).exists() else source if (source / "config.json").is_file() else source.parent
    return folder / "evaluation.json"


def results_of(file: Path, source: str | Path) -> list[dict[str, Any]]:
    """The rows of one model in an ``evaluation.json``: the newest of each benchmark, of those asked in full.

    Args:
        file: It need not be there.
        source: The checkpoint or folder of the weights, as ``LanguageModel.source``.

    Returns:
        The fields of ``Result``, and ``model``.

    Raises:
        UserError: The file holds something else.
    """
    try:
        rows = [row for row in _read(file) if row["model"] == _name(file, source)]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: holds no results of an evaluation; remove it") from None
    return list({row["benchmark"]: row for row in rows if row["settings"].get("limit") is None}.values())


def save(file: Path, source: str | Path, results: Sequence[Result]) -> None:
    """Adds a model's results to ``file``, in place of those of the same benchmarks under the same settings.

    Raises:
        UserError: The file holds something else, or its folder cannot be written to.
    """
    check_output(file)
    new = [{"model": _name(file, source), **dataclasses.asdict(result)} for result in results]
    keys = [_key(row) for row in new]
    rows = [row for row in _read(file) if _key(row) not in keys] + new
    versions = {"cheaper": cheaper.__version__, **{package: version(package) for package in PACKAGES}}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record = {"date": now, "versions": versions, "results": rows}
    write_atomically(file, (json.dumps(record, indent=2) + "\n").encode())


def check_output(file: Path) -> None:
    """Tells whether results can be added to ``file``.

    Raises:
        UserError: The file holds something else, or its folder cannot be written to.
    """
    if not os.access(folder := file.absolute().parent, os.W_OK):
        raise UserError(f"--output {file}: {folder} cannot be written to; choose another folder")
    try:
        _ = [_key(row) for row in _read(file)]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--output {file}: is there already, and holds no results") from None


def _read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["results"] if file.exists() else []


def _name(file: Path, source: str | Path) -> str:
    """A model's name in ``file``: from its folder where it lies in there, so that a run may move."""
    folder, source = file.resolve().parent, Path(source).resolve()
    return str(source.relative_to(folder) if source.is_relative_to(folder) else source)


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["benchmark"], json.dumps(row["settings"], sort_keys=True)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.4f}"
