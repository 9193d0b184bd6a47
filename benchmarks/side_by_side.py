"""What the benchmarks share: sides timed in turn, ratios taken pair by pair, and how a result is kept."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int = 5, warm_up: int = 1) -> dict[str, list[float]]:
    """Times every side once in each round, so that a machine that slows down slows all of them.

    Args:
        sides: What to time. On a GPU a side must wait for it.
        rounds: That count.
        warm_up: Rounds before them, which do not.

    Returns:
        Seconds of each side in each round.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            if number >= 0:
                times[name].append(time.perf_counter() - begin)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most, to four significant digits."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def speed_ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """How many times as fast ``ours`` is, from seconds of the same rounds."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def save(name: str, result: Mapping[str, object], packages: tuple[str, ...] = ("torch",)) -> None:
    """Writes ``results/<name>.json`` with the conditions: date, command, machine and versions."""
    conditions = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0], RESULTS.parents[1]), *sys.argv[1:]]),
        "hardware": machine(),
        "python": sys.version.split()[0],
        "versions": {package: version(package) for package in packages},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**conditions, **result}, indent=2) + "\n")


def machine() -> str:
    """The GPU, or the processor with what of it matters to matrix products."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo").read_text()
    name = next(line.split(":")[1].strip() for line in about.splitlines() if line.startswith("model name"))
    features = [feature for feature in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if feature in about]
    return f"{len(os.sched_getaffinity(0))} cores of {name}, {features[0] if features else 'no vectors'}"


def show(rows: list[tuple[str, ...]]) -> None:
    """Prints a table; the first row is its head, the first column is aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
