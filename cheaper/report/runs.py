"""Run folders, read back: everything a report shows of a run, whether it has finished or not."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cheaper.compose import leaves
from cheaper.errors import UserError, did_you_mean
from cheaper.evaluation.results import results_of
from cheaper.files import newest_checkpoint, read_records

MAX_POINTS = 2000  # of a curve; more cannot be seen, and make a page slow


@dataclass
class Curve:
    """A metric over the tokens trained on; ``None`` where it was not finite."""

    tokens: list[float]
    values: list[float | None]


@dataclass
class Run:
    """What a run folder holds.

    Args:
        name: Its run name, or its folder where two runs of a report have one name.
        config: Its resolved configuration by dotted key.
        summary: ``summary.json``; empty for a run that has not finished.
        curves: By metric.
        samples: Prompt → (step, continuation) in order.
        results: Of the newest checkpoint, from ``evaluation.json``; none for a run that was not evaluated.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, Curve]
    samples: dict[str, list[tuple[int, str]]]
    results: list[dict[str, Any]]

    @property
    def figures(self) -> dict[str, Any]:
        """One value each: of the summary, or the newest ones of a run that has not finished."""
        if self.summary:
            single = {name: value for name, value in self.summary.items() if not isinstance(value, (dict, list))}
            return single | {name: round(value, 4) for name, value in self.summary["held_out"].items()}
        newest = {name: curve.values[-1] for name, curve in self.curves.items() if not name.startswith("data/")}
        return {"run": self.name, "state": "not finished"} | newest

    @property
    def expected(self) -> dict[str, float]:
        """What the recipe expects of this size of model, by the summary's names."""
        prefix = f"training.expected.{self.config['model.name']}."
        found = {key.removeprefix(prefix): value for key, value in self.config.items() if key.startswith(prefix)}
        return {name: value for name, value in found.items() if value is not None}


def load_runs(folders: list[Path]) -> list[Run]:
    """Reads run folders, in the order given.

    Raises:
        UserError: A folder holds no run, or a file in it is damaged.
    """
    runs = [_load_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs


def _load_run(folder: Path) -> Run:
    if not (folder / "metrics.jsonl").exists():
        near = [str(path.parent) for path in folder.parent.glob("*/metrics.jsonl")]
        raise UserError(f"run {folder}: no metrics.jsonl there{did_you_mean(str(folder), near)}")
    try:
        config = dict(leaves(yaml.safe_load((folder / "run.yaml").read_text())))
        summary, newest = _optional(folder / "summary.json"), newest_checkpoint(folder)
        results = results_of(folder / "evaluation.json", newest) if newest else []
        curves = _curves(read_records(folder / "metrics.jsonl"))
        samples = _samples(read_records(folder / "samples.jsonl"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"run {folder}: a file is damaged ({' '.join(str(error).split())})") from None
    return Run(config["run_name"], folder, config, summary, curves, samples, results)


def _optional(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _curves(records: list[dict[str, Any]]) -> dict[str, Curve]:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            if name not in ("step", "tokens"):
                points[name].append((record["tokens"], value))
    return {name: _thinned(found) for name, found in points.items()}


def _thinned(points: list[tuple[float, float]]) -> Curve:
    """At most ``MAX_POINTS`` points: means of as many neighbours as it takes."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    return Curve([tokens for tokens, _ in means], [value if math.isfinite(value) else None for _, value in means])


def _samples(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, str]]]:
    by_prompt: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for record in records:
        by_prompt[record["prompt"]].append((record["step"], record["continuation"]))
    return dict(by_prompt)
