"""From the command to the first step: seconds until a run of the quickstart has recorded its first step.

    python benchmarks/start.py [--rounds 5]

Each round is the command that a user types, in a process of its own, on the quickstart's shards, made before; what
Python and the page cache keep from earlier runs is there, as after a first try. Beside it what a Python with nothing
but ``import composer`` takes. Prints a table, writes ``benchmarks/results/start.json``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import alternate, save, show, spread

RECIPE = Path(__file__).parents[1] / "yamls" / "quickstart" / "phase1.yaml"


def cheaper(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "cheaper.cli", *arguments]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def first_step(folder: Path) -> None:
    """Starts a run, waits for the first line of its metrics and ends it."""
    run = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "cheaper.cli", "train", str(RECIPE), "logging.interval=1"]
    with subprocess.Popen(
        [*command, f"training.checkpoint_dir={run}"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cheaper(folder, "sample")
        cheaper(folder, "convert", str(RECIPE))
        sides = {
            "command to first step": lambda: first_step(folder),
            "import composer": lambda: subprocess.run([sys.executable, "-c", "import composer"], check=True),
        }
        seconds = {name: spread(values) for name, values in alternate(sides, options.rounds).items()}
    save("start", {"seconds": seconds}, ("torch", "mosaicml", "mosaicml-streaming"))
    lines = [(name, *(f"{value[key]:.2f}" for key in ("median", "min", "max"))) for name, value in seconds.items()]
    show([("seconds", "median", "least", "most"), *lines])


if __name__ == "__main__":
    main()
