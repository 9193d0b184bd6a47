"""A report as one HTML file that needs no network: data, styles and the plotting library (uPlot, MIT) are inside."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from cheaper.files import write_atomically
from cheaper.report.runs import Run

HERE = Path(__file__).parent
# Colours that people of every colour vision can tell apart: Okabe and Ito, "Color Universal Design", without black.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8a800"]
# What the vertical axis of a metric counts, by the end of its name.
UNITS = {
    "loss": "nats per target",
    "kd_loss": "nats per target",
    "cross_entropy": "nats per target",
    "accuracy": "share of targets",
    "teacher_agreement": "share of targets",
    "tokens_per_second": "all devices",
    "mfu": "share of the peak",
    "grad_norm": "before clipping",
    "gpu_memory": "GiB, peak",
}


def write_page(runs: list[Run], path: Path) -> None:
    """Writes the report of ``runs`` to ``path``."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    colours = {run.name: colour_of(number) for number, run in enumerate(runs)}
    page = environment.get_template("page.html").render(
        runs=runs,
        colours=colours,
        figures=_rows([run.figures for run in runs]),
        groups=chart_groups(runs),
        charts=[_chart(name, runs, colours) for name in metrics(runs)],
        prompts=list(dict.fromkeys(prompt for run in runs for prompt in run.samples)),
        settings=_rows([run.config for run in runs]),
        **{name: _file(f"uplot/{file}") for name, file in (("uplot", "uPlot.iife.min.js"), ("style", "uPlot.min.css"))},
        script=_file("page.js"),
    )
    write_atomically(path, page.encode())


def metrics(runs: list[Run]) -> list[str]:
    """Names of all metrics: losses first, then as they were logged, those of a prefix together."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    order = ["train/", "eval/", "data/share/", "data/"]
    rank = {name: next((i for i, prefix in enumerate(order) if name.startswith(prefix)), len(order)) for name in names}
    return sorted(names, key=rank.__getitem__)


def chart_groups(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Metrics by the first part of their names."""
    return [(prefix, list(names)) for prefix, names in groupby(metrics(runs), lambda name: name.split("/")[0])]


def colour_of(number: int) -> str:
    """The colour of the run of this number."""
    return COLOURS[number % len(COLOURS)]


def unit_of(metric: str) -> str:
    """What the values of a metric count; empty where the name says it."""
    return UNITS.get(metric.rsplit("/", 1)[-1], "")


def _chart(metric: str, runs: list[Run], colours: dict[str, str]) -> dict[str, Any]:
    curves = [(run.name, run.curves[metric]) for run in runs if metric in run.curves]
    return {
        "metric": metric,
        "unit": unit_of(metric),
        "runs": [name for name, _ in curves],
        "colours": [colours[name] for name, _ in curves],
        "curves": [[curve.tokens, curve.values] for _, curve in curves],
    }


def _rows(columns: list[dict[str, Any]]) -> list[tuple[str, list[Any], bool]]:
    """A row for each key of any column: the key, the value of each column, and whether the values differ."""
    keys = dict.fromkeys(key for column in columns for key in column)
    values = [(key, [column.get(key) for column in columns]) for key in keys]
    return [(key, row, any(value != row[0] for value in row)) for key, row in values]


def _file(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))  # our own files: safe to put in as they are
