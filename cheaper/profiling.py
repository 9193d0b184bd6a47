"""Where a step's time and memory go: a trace to look at in a browser, and a page of text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import State
from composer.loggers import Logger
from composer.profiler import Profiler, ProfilerAction, TorchProfiler, TraceHandler, cyclic_schedule
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from cheaper.files import write_atomically

OPERATIONS = 30  # on the page
SLICES = 48  # of a step, each with its memory
BARS = "▁▂▃▄▅▆▇█"


def build_profiler(folder: Path) -> Profiler:
    """Records three of the run's first steps into ``rank<n>.json`` and ``rank<n>.txt``.

    Three go by before: two in which the data loader starts and blocks are compiled, one that warms the recording up.
    Of a run of fewer than four steps there is no record.

    Args:
        folder: Of the run, for these files alone.
    """
    cycle, page = cyclic_schedule(wait=2, warmup=1, active=3), ProfilePage()

    def once(state: State) -> ProfilerAction:
        return ProfilerAction.SKIP if page.written else cycle(state)  # the cycle begins again in every epoch

    return Profiler(
        schedule=once,
        trace_handlers=page,
        sys_prof_cpu=False,
        torch_prof_folder=str(folder),
        torch_prof_filename="rank{rank}.json",
        torch_prof_remote_file_name=None,
        torch_prof_memory_remote_file_name=None,
        torch_prof_overwrite=True,
    )


class ProfilePage(TraceHandler):
    """Writes the page of text beside a trace."""

    def __init__(self):
        self.written = False

    def init(self, state: State, logger: Logger) -> None:
        self._recording = next(callback for callback in state.callbacks if isinstance(callback, TorchProfiler))

    def process_chrome_json_trace_file(self, filepath: Path) -> None:
        averages = self._recording.profiler.key_averages()
        trace = json.loads(filepath.read_text())["traceEvents"]
        write_atomically(filepath.with_suffix(".txt"), describe(averages, trace, torch.cuda.is_available()).encode())
        self.written = True


def describe(averages: Iterable[FunctionEventAvg], trace: list[dict[str, Any]], on_gpu: bool) -> str:
    """Time and memory by operation, and the memory over each step.

    Args:
        averages: Of each operation, over all steps.
        trace: Events of a Chrome trace.
        on_gpu: Whether to tell of the GPU's time and memory, else of the processor's.
    """
    steps = sorted((e for e in trace if is_step(e)), key=lambda event: event["ts"])
    operations = [average for average in averages if average.device_type == DeviceType.CPU]
    operations.sort(key=lambda average: -_microseconds(average, on_gpu))
    total = sum(_microseconds(average, on_gpu) for average in operations)
    lines = [f"{len(steps)} steps on the {'GPU' if on_gpu else 'processor'}", ""]
    timelines = [memory_timeline(trace, step, on_gpu) for step in steps]
    most = max(map(max, timelines))
    for step, timeline in zip(steps, timelines, strict=True):
        bars = "".join(BARS[max(level, 0) * (len(BARS) - 1) // max(most, 1)] for level in timeline)
        lines.append(f"{step['name']:<17}{step['dur'] / 1e3:10.1f} ms{max(timeline) / 2**20:12.1f} MiB at most  {bars}")
    lines += ["" if on_gpu else "(of what was allocated since the recording began)", ""]
    lines.append(f"{'in each step, without what it calls':<56}{'ms':>12}{'share':>8}{'calls':>16}{'MiB kept':>10}")
    for average in operations[:OPERATIONS]:
        spent = _microseconds(average, on_gpu)
        kept = average.self_device_memory_usage if on_gpu else average.self_cpu_memory_usage
        lines.append(
            f"{average.key[:54]:<56}{spent / 1e3 / len(steps):12.2f}{spent / max(total, 1):8.1%}"
            f"{average.count / len(steps):16.1f}{kept / 2**20 / len(steps):10.1f}"
        )
    return "\n".join(lines) + "\n"


def is_step(event: dict[str, Any]) -> bool:
    """Whether an event of a trace is a whole step, as the processor saw it."""
    return event.get("name", "").startswith("ProfilerStep") and event.get("cat") == "user_annotation"


def _microseconds(average: FunctionEventAvg, on_gpu: bool) -> float:
    return average.self_device_time_total if on_gpu else average.self_cpu_time_total


def memory_timeline(trace: list[dict[str, Any]], step: dict[str, Any], on_gpu: bool) -> list[int]:
    """The most bytes that were allocated at once in each of ``SLICES`` equal parts of a step."""
    device = (DeviceType.CUDA if on_gpu else DeviceType.CPU).value
    changes = sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in trace
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == device
    )
    times, levels = [time for time, _ in changes], [0, *(level for _, level in changes)]
    edges = np.linspace(step["ts"], step["ts"] + step["dur"], SLICES + 1)
    passed = np.searchsorted(times, edges, side="right").tolist()
    return [max(levels[first : last + 1]) for first, last in itertools.pairwise(passed)]
