"""What the names of benchmarks stand for, and the harness's tasks behind them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from cheaper.errors import UserError
from cheaper.evaluation.local_data import benchmark_data

OURS = Path(__file__).parent / "tasks"
HARNESS = Path(lm_eval.tasks.__file__).parent
NEAR_ENOUGH = 0.05  # of a published size, in parameters


@dataclass(frozen=True)
class Benchmark:
    """How a model is asked.

    Args:
        name: What results call it.
        task: A task, group or tag: the harness's or ours.
        folder: Of the harness's tasks, where the task is; ``None`` for ours.
        metric: The one that is reported; ``None`` for the task's first.
        shots: Examples before each question; ``None`` for the task's own number.
        chat: Whether the chat template is applied.
        max_new_tokens: Of an answer; ``None`` for the task's own number.
        samples: Answers drawn to each question; ``None`` for one, or the task's own number.
        temperature: Of the draws; 0 takes the most likely token each time.
        top_p: The mass of the most likely words that are drawn from.
        expected: The specification's scores by size of the model.
        published: MobileLLM-R1's scores by size of the model.
    """

    name: str
    task: str
    folder: str | None = None
    metric: str | None = None
    shots: int | None = 0
    chat: bool = False
    max_new_tokens: int | None = None
    samples: int | None = None
    temperature: float = 0.0
    top_p: float = 0.95
    expected: dict[str, float] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)


@functools.cache
def catalogue() -> dict[str, Any]:
    """The contents of ``benchmarks.yaml``."""
    return yaml.safe_load(Path(__file__).with_name("benchmarks.yaml").read_text(encoding="utf-8"))


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks that ``names`` stand for: ours, those of suites and averages, or tasks of the harness.

    Raises:
        UserError: There is no such benchmark.
    """
    ours, averages, suites = (catalogue()[key] for key in ("benchmarks", "averages", "suites"))
    found: dict[str, Benchmark] = {}
    for name in names:
        for part in suites.get(name) or averages.get(name, {}).get("of") or [name]:
            about = ours.get(part) or {"task": part, "folder": "", "shots": None}
            found[part] = Benchmark(name=part, **about)
    if unknown := [name for name in found if name not in ours and name not in index("").all_tasks]:
        known = {*ours, *averages, *suites, *index("").all_tasks}
        near = difflib.get_close_matches(unknown[0], sorted(known), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join([*suites, *averages, *ours])}"
        raise UserError(f"--benchmarks {unknown[0]}: no such benchmark; {hint}")
    return list(found.values())


@functools.cache
def index(folder: str | None) -> TaskManager:
    """The tasks in a folder of the harness's, all of them for ``""``; without one, ours."""
    return TaskManager(include_defaults=False, include_path=str(OURS if folder is None else HARNESS / folder))


def runs_code(benchmark: Benchmark) -> bool:
    """Whether the benchmark executes what the model writes.

    Raises:
        UserError: It would do so without a sandbox.
    """
    if not any(entry.get("unsafe_code") for entry in _configurations(benchmark.folder, benchmark.task)):
        return False
    if benchmark.folder is None:
        return True
    ours = [name for name, about in catalogue()["benchmarks"].items() if about.get("metric") == "pass_at_1"]
    why = "the harness would run generated code without a sandbox"
    raise UserError(f"--benchmarks {benchmark.name}: refused, {why}; choose from {', '.join(ours)}")


def _configurations(folder: str | None, name: str) -> list[dict[str, Any]]:
    """The configurations of a task, or of all tasks below a group or tag."""
    entry = index(folder).task_index.get(name)
    if entry is None:
        return []
    members = [*(entry.tags if entry.cfg is None else []), *_members(entry.cfg or {})]
    return [entry.cfg or {}, *(cfg for member in members for cfg in _configurations(folder, member))]


def _members(configuration: dict[str, Any]) -> list[str]:
    members = configuration["task"] if "group" in configuration else []
    named = [
        member if isinstance(member, str) else member.get("task") or member.get("group") for member in members or ()
    ]
    return [member for member in named if isinstance(member, str)]


def load_tasks(benchmark: Benchmark, data_dir: Path | None, seed: int) -> dict[str, Any]:
    """The harness's tasks of a benchmark, set up, with their data.

    Raises:
        UserError: The data are not there, or a package that the task needs.
    """
    with benchmark_data(data_dir):
        try:
            loaded = index(benchmark.folder).load([benchmark.task])
        except (ImportError, AssertionError) as error:  # tasks say so where a package is not there
            why = " ".join(str(error).split())[:160]
            raise UserError(f"--benchmarks {benchmark.name}: the harness cannot load it ({why})") from None
    for task in loaded["tasks"].values():
        _set_up(task, benchmark, seed)
    return loaded


def _set_up(task: Task, benchmark: Benchmark, seed: int) -> None:
    shots = task.get_config("num_fewshot") or 0 if benchmark.shots is None else benchmark.shots
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(seed)
    if task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", _generation(benchmark), update=True)
        if benchmark.samples:
            task.set_config("repeats", benchmark.samples)


def _generation(benchmark: Benchmark) -> dict[str, Any]:
    """What a benchmark says of its answers, in the harness's words."""
    settings: dict[str, Any] = {}
    if benchmark.temperature:
        settings |= {"do_sample": True, "temperature": benchmark.temperature, "top_p": benchmark.top_p}
    if benchmark.max_new_tokens:
        settings["max_gen_toks"] = benchmark.max_new_tokens
    return settings


def at_size(scores: dict[str, float], parameters: int) -> float | None:
    """The one of ``scores`` that is for models of about this many parameters."""
    for size, of_size in catalogue()["sizes"].items():
        if abs(parameters / of_size - 1) < NEAR_ENOUGH:
            return scores.get(size)
    return None
