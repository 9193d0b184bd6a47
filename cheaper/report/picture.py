"""The curves of a report as one PNG, for places that show no HTML."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from cheaper.report.page import colour_of, metrics, unit_of
from cheaper.report.runs import Run

COLUMNS = 3


def write_picture(runs: list[Run], path: Path) -> None:
    """Draws every metric over tokens, the runs overlaid, to ``path``."""
    names = metrics(runs)
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, COLUMNS, number + 1)
        axes.set_title(" · ".join(filter(None, (name, unit_of(name)))), fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
        for i, run in enumerate(runs):
            if curve := run.curves.get(name):
                values = [math.nan if value is None else value for value in curve.values]
                marker = "o" if len(values) == 1 else None
                axes.plot(curve.tokens, values, color=colour_of(i), linewidth=1.2, marker=marker, label=run.name)
    figure.legend(*_one_entry_per_run(figure), loc="outside upper center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)


def _one_entry_per_run(figure: Figure) -> tuple[list, list[str]]:
    entries = {}
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, lines, strict=True))
    return list(entries.values()), list(entries)
