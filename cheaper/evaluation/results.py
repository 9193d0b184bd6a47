"""What a model scored: a table, and ``evaluation.json``."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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
    """

    benchmark: str
    metric: str
    shots: int
    samples: int
    score: float
    stderr: float | None = None
    expected: float | None = None
    published: float | None = None


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


def save(path: Path, model: str, results: Sequence[Result]) -> None:
    """Adds results to the file ``path``; those of the same benchmarks are replaced.

    Raises:
        UserError: The file holds something else, or another model's results.
    """
    before = _read(path)
    if before and before["model"] != model:
        raise UserError(f"--output {path}: has results of {before['model']}; remove it or choose another name")
    new = {result.benchmark: dataclasses.asdict(result) for result in results}
    rows = {row["benchmark"]: row for row in before.get("results", ())} | new
    versions = {"cheaper": cheaper.__version__, **{package: version(package) for package in PACKAGES}}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record = {"model": model, "date": now, "versions": versions, "results": list(rows.values())}
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def _read(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        if {"model", "results"} <= record.keys():
            return record
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(f"--output {path}: is there already, and holds no results")


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.4f}"
