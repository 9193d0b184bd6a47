"""Stages in a row: each is a training of its own process, started from the weights of an earlier one.

What has been done is read from the stages' run folders, so the same command goes on after any interruption.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
import yaml

from cheaper.compose import load_config, yaml_dir
from cheaper.errors import UserError, did_you_mean
from cheaper.files import newest_checkpoint


@dataclass
class Stage:
    """One stage of a pipeline as its YAML says it, and where its run is.

    Args:
        name: Its key.
        recipe: The file of its recipe.
        start_from: The earlier stage whose weights it takes.
        overrides: For its training: the pipeline's, then the command line's.
        folder: Its run folder.
    """

    name: str
    recipe: Path
    start_from: str | None = None
    overrides: list[str] = field(default_factory=list)
    folder: Path = Path()

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def checkpoint(self) -> Path | None:
        return newest_checkpoint(self.folder)

    def state(self) -> str:
        """In words."""
        if self.finished:
            summary = json.loads((self.folder / "summary.json").read_text())
            missed = sum(not target["met"] for target in summary.get("targets", ()))
            missing = f", {missed} targets missed" if missed else ""
            return f"finished, {summary['tokens']:,} tokens, loss {summary['loss']}{missing}"
        return f"interrupted at {self.checkpoint.stem}" if self.checkpoint else "not started"


def load_pipeline(path: Path, overrides: Sequence[str]) -> list[Stage]:
    """Reads a pipeline and composes each of its runs once, so that a mistake in the last is told before the first.

    Raises:
        UserError: A key, a stage or a recipe is wrong.
    """
    stages: dict[str, Stage] = {}
    for name, raw in _sections(path).items():
        known = {key.name for key in fields(Stage)} - {"name", "folder"}
        for key in raw if isinstance(raw, dict) else ():
            if key not in known:
                raise UserError(f"stages.{name}.{key} is not a key{did_you_mean(key, known)} ({path})")
        if not isinstance(raw, dict) or "recipe" not in raw:
            raise UserError(f"stages.{name} names no recipe ({path})")
        before = raw.get("start_from")
        if before is not None and before not in stages:
            earlier = f"expected one of the stages before it{did_you_mean(before, stages)}"
            raise UserError(f"stages.{name}.start_from is {before}: {earlier} ({path})")
        stage = Stage(name, path.parent / raw["recipe"], before, [*raw.get("overrides", ()), *overrides])
        stage.folder = Path(load_config([str(stage.recipe), *stage.overrides]).training.checkpoint_dir)
        stages[name] = stage
    for stage in stages.values():
        same = [other.name for other in stages.values() if other.folder == stage.folder]
        if len(same) > 1:
            raise UserError(f"stages {' and '.join(same)} have one folder, {stage.folder}; give them a run_name each")
    return list(stages.values())


def _sections(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        known = {file.name for base in (path.parent, yaml_dir()) for file in base.glob("*pipeline*.yaml")}
        raise UserError(f"pipeline {path}: no such file{did_you_mean(path.name, known)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"pipeline {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict) or set(content) != {"stages"}:
        raise UserError(f"pipeline {path}: expected one section, stages, with the stages by name")
    return content["stages"]


def run_pipeline(stages: list[Stage], launcher: str, first: str | None = None, until: str | None = None) -> int:
    """Runs the stages from ``first`` to ``until`` that have not finished; returns the exit status of the last one run.

    Args:
        stages: In order.
        launcher: The command that starts a Python module in as many processes as the run takes.
        first: Where to begin; stages before it must have finished, if others start from them.
        until: Where to end.

    Raises:
        UserError: A stage starts from one that has not finished.
    """
    by_name = {stage.name: stage for stage in stages}
    for stage in selected(stages, first, until):
        if stage.finished:
            print(f"{stage.name}: {stage.state()}", flush=True)
            continue
        before = by_name.get(stage.start_from)
        if before and not before.finished:
            raise UserError(f"stage {stage.name} starts from {before.name}, which has not finished ({before.folder})")
        if status := _run(command(stage, before, launcher)):
            return status
    return 0


def selected(stages: list[Stage], first: str | None, until: str | None) -> list[Stage]:
    """The stages from ``first`` to ``until``.

    Raises:
        UserError: There is no such stage, or the end comes before the beginning.
    """
    names = [stage.name for stage in stages]
    for option, name in (("--from", first), ("--until", until)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: no such stage{did_you_mean(name, names)}")
    begin = names.index(first) if first else 0
    end = names.index(until) + 1 if until else len(names)
    if begin >= end:
        raise UserError(f"--from {first} comes after --until {until}")
    return stages[begin:end]


def command(stage: Stage, before: Stage | None, launcher: str) -> list[str]:
    """What runs a stage, or goes on with it."""
    start = [f"training.checkpoint_path={before.folder}"] if before else []
    resume = ["training.resume=true"] if stage.checkpoint else []
    program = [*shlex.split(launcher), "-m", "cheaper.cli", "train", str(stage.recipe)]
    return [*program, *start, *stage.overrides, *resume]


def _run(arguments: list[str]) -> int:
    """Runs a stage; returns the launcher's exit status, or 128 and the number of the signal that asked for an end."""
    print("\n$ " + shlex.join(arguments), flush=True)
    signals: list[int] = []
    earlier = {
        signum: signal.signal(signum, lambda signum, frame: signals.append(signum))
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(signum) != signal.SIG_IGN  # as nohup sets it
    }
    try:
        # In a session of its own, for the terminal would send Ctrl-C to the launcher too.
        process = subprocess.Popen(arguments, start_new_session=True)
        told: dict[psutil.Process, int] = {}
        ranks = [psutil.Process(process.pid)]
        while process.poll() is None:
            if signals:
                ranks = _ranks(process.pid) or ranks
                for rank in ranks:
                    if told.get(rank) != len(signals):
                        told[rank] = len(signals)
                        with contextlib.suppress(psutil.Error):
                            rank.send_signal(signal.SIGTERM if signals[-1] == signal.SIGHUP else signals[-1])
            time.sleep(0.1)
        return 128 + signals[0] if signals else process.returncode
    except FileNotFoundError:
        raise UserError(f"--launcher {arguments[0]}: no such command") from None
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


def _ranks(launcher: int) -> list[psutil.Process]:
    """The processes that a launcher started for its ranks; none if it is the training itself.

    They are told of a signal in its place: torchrun and Composer's launcher would give them 30 seconds to the end.
    """
    ranks: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                training = process.cmdline()
                forked = training == psutil.Process(process.ppid()).cmdline()  # a data loader's worker
                if "cheaper.cli" in training and not forked and "LOCAL_RANK" in process.environ():
                    ranks.append(process)
    return ranks


def table(stages: list[Stage]) -> str:
    """The states of the stages, a line each."""
    width = max(len(stage.name) for stage in stages)
    return "\n".join(f"  {stage.name:<{width}}  {stage.state():<50}  {stage.folder}" for stage in stages)


def default_launcher() -> str:
    """Composer's where the machine has several GPUs, of which it takes all; else Python alone, which starts sooner."""
    several = len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1
    return str(Path(sys.executable).with_name("composer")) if several else sys.executable
