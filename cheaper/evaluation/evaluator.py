"""Asks a model the questions of benchmarks, by EleutherAI's evaluation harness."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluator

from cheaper.distributed.processes import join_processes
from cheaper.errors import UserError
from cheaper.evaluation.benchmarks import Benchmark, at_size, catalogue, find_benchmarks, load_tasks, runs_code
from cheaper.evaluation.code_execution import check_sandbox
from cheaper.evaluation.harness import CheaperLM
from cheaper.evaluation.processes import is_first
from cheaper.evaluation.results import Result
from cheaper.language_model import LanguageModel

SEED = 1234  # the harness's own for examples, so that they are those of other people's runs
BOOTSTRAPS = 1000  # for standard errors that have no formula


def evaluate(
    model: str | LanguageModel,
    benchmarks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    samples: int | None = None,
    tokenizer: str | None = None,
    seed: int = SEED,
    execute_code: bool = False,
) -> list[Result]:
    """Asks a model the questions of benchmarks. Under ``torchrun`` the processes share them.

    Args:
        model: A model, or where one lies, see ``load_model``.
        benchmarks: Names from ``benchmarks.yaml``, or tasks of the harness; ``base`` and ``final`` are suites.
        data_dir: Local copies of the data sets, at ``<owner>/<name>[/<configuration>]/<split>.jsonl`` or ``.parquet``,
            see ``benchmark_data``; without it they come from the hub.
        limit: Questions of each task at most.
        batch_size: Rows at once.
        max_new_tokens: Of an answer, instead of the benchmark's number.
        samples: Answers drawn to each question, for benchmarks that are averaged over several.
        tokenizer: Instead of the model's own.
        seed: Of examples, and of draws.
        execute_code: Run the programs that the model writes, in a sandbox. Without it benchmarks of code are left out.

    Returns:
        A result of each benchmark, then averages.

    Raises:
        UserError: The model, a benchmark, its data or the sandbox is not there.

    Example::

        for result in evaluate("runs/quickstart-phase2", ["arc_easy", "hellaswag"], data_dir="/data/benchmarks"):
            print(result.benchmark, result.score)
    """
    asked = chosen(benchmarks, execute_code, samples)
    lm = load(model, tokenizer, batch_size, max_new_tokens, seed)
    tasks = load_all_tasks(asked, Path(data_dir) if data_dir else None, seed)
    return list(results(lm, asked, tasks, limit, seed))


def chosen(names: Sequence[str], execute_code: bool, samples: int | None = None) -> list[Benchmark]:
    """The benchmarks to run; says which are left out because they would execute code.

    Raises:
        UserError: There is no such benchmark, nothing is left, or there is no sandbox.
    """
    found = find_benchmarks(names)
    with_code = [benchmark for benchmark in found if runs_code(benchmark)]
    if with_code and execute_code:
        check_sandbox()
    elif with_code:
        left_out = ", ".join(benchmark.name for benchmark in with_code)
        if len(with_code) == len(found):
            raise UserError(f"--benchmarks {left_out}: runs generated code; add --execute_code to allow that")
        if is_first():
            print(f"left out, for want of --execute_code: {left_out}", file=sys.stderr)
        found = [benchmark for benchmark in found if benchmark not in with_code]
    if samples is None:
        return found
    return [dataclasses.replace(one, samples=samples) if one.samples else one for one in found]


def load_all_tasks(benchmarks: Sequence[Benchmark], data_dir: Path | None, seed: int) -> list[dict[str, Any]]:
    """The harness's tasks of each benchmark, to be asked once: examples are drawn from them.

    Raises:
        UserError: The data of one are not there.
    """
    loaded = []
    for benchmark in benchmarks:
        _seed_all(seed)
        loaded.append(load_tasks(benchmark, data_dir, seed))
    return loaded


def load(
    model: str | LanguageModel, tokenizer: str | None, batch_size: int, max_new_tokens: int | None, seed: int
) -> CheaperLM:
    """The model for the harness, in each of ``torchrun``'s processes."""
    for talkative in ("lm_eval", "huggingface_hub"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join_processes()
    return CheaperLM(model, tokenizer, batch_size, max_new_tokens=max_new_tokens, seed=seed)


def results(
    lm: CheaperLM, benchmarks: Sequence[Benchmark], tasks: Sequence[dict[str, Any]], limit: int | None, seed: int
) -> Iterator[Result]:
    """The results of benchmarks one by one, then the averages of those that are all there."""
    parameters = sum(parameter.numel() for parameter in lm.decoder.parameters())
    done: dict[str, Result] = {}
    for benchmark, loaded in zip(benchmarks, tasks, strict=True):
        _seed_all(seed)
        figures = evaluator.evaluate(
            lm,
            loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            apply_chat_template=benchmark.chat,
            fewshot_as_multiturn=benchmark.chat,
            confirm_run_unsafe_code=benchmark.folder is None,  # ours have a sandbox
        )
        settings = {"limit": limit, "seed": seed, **_answers(lm, benchmark, loaded)}
        for result in _results(figures, benchmark, loaded, parameters, settings):
            done[result.benchmark] = result
            yield result
    for name, average in catalogue()["averages"].items():
        if done.keys() >= set(average["of"]):
            yield _average(name, [done[part] for part in average["of"]], at_size(average["published"], parameters))


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)


def _answers(lm: CheaperLM, benchmark: Benchmark, loaded: dict[str, Any]) -> dict[str, Any]:
    """How answers are generated; nothing where none are."""
    if all(task.OUTPUT_TYPE != "generate_until" for task in loaded["tasks"].values()):
        return {"chat": benchmark.chat}
    return {
        "chat": benchmark.chat,
        "draws": benchmark.samples,
        "temperature": benchmark.temperature,
        "max_new_tokens": lm.max_new_tokens or benchmark.max_new_tokens,
    }


def _results(
    figures: dict[str, Any], benchmark: Benchmark, loaded: dict[str, Any], parameters: int, settings: dict[str, Any]
) -> Iterator[Result]:
    """One result, or one of each task of a tag."""
    of = figures["results"]
    names = [benchmark.task] if benchmark.task in of else list(loaded["tasks"])
    for name in names:
        counts = figures["n-samples"]
        asked = counts[name]["effective"] if name in counts else sum(count["effective"] for count in counts.values())
        metric, score, stderr = _figure(of[name], benchmark.metric)
        yield Result(
            benchmark=benchmark.name if name == benchmark.task else name,
            metric=metric,
            shots=next(iter(loaded["tasks"].values())).get_config("num_fewshot"),
            samples=asked,
            score=score,
            stderr=stderr,
            expected=at_size(benchmark.expected, parameters),
            published=at_size(benchmark.published, parameters),
            settings=settings,
        )


def _figure(figures: dict[str, Any], metric: str | None) -> tuple[str, float, float | None]:
    """A metric, its value and standard error, from the harness's ``metric,filter`` and ``metric_stderr,filter``."""
    for key, value in figures.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr") and name == (metric or name):
            stderr = figures.get(f"{name}_stderr,{filtered}")
            return name, float(value), float(stderr) if isinstance(stderr, float) else None
    raise UserError(f"--benchmarks {figures.get('name', '')}: the harness gives it no score of its own; name its tasks")


def _average(name: str, parts: Sequence[Result], published: float | None) -> Result:
    score = sum(part.score for part in parts) / len(parts)
    stderr = math.sqrt(sum((part.stderr or 0.0) ** 2 for part in parts)) / len(parts)
    samples = sum(part.samples for part in parts)
    settings = {key: parts[0].settings[key] for key in ("limit", "seed")}
    return Result(name, "average", parts[0].shots, samples, score, stderr, published=published, settings=settings)
