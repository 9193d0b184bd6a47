"""The verbs of ``cheaper`` on a model that is there: generate, chat, evaluate, export, import."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cheaper.arguments import ArgumentParser
from cheaper.errors import UserError


def generate(args: list[str]) -> int:
    """Continues a prompt piece by piece, or the prompts of a file as JSON lines."""
    parser = ArgumentParser(prog="cheaper generate")
    _add_model(parser)
    parser.add_argument("prompt", nargs="?", help="the text to go on with; read from standard input where it is -")
    parser.add_argument("--chat", action="store_true", help="the prompt is what a user says; answer it")
    parser.add_argument("--file", type=Path, help="a prompt on each line: text, or JSON with prompt or messages")
    parser.add_argument("--output", type=Path, help="of --file; by default standard output")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts of --file at once")
    _add_sampling(parser)
    options = parser.parse_args(args)
    if (options.prompt is None) == (options.file is None):
        raise UserError("cheaper generate: expected a prompt or --file")
    if options.output and options.output.exists():
        raise UserError(f"--output {options.output}: is there already; choose another name")
    if options.output and not options.output.absolute().parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.absolute().parent}")
    if options.batch_size < 1:
        raise UserError(f"--batch_size {options.batch_size}: expected 1 or more")
    sampling = _sampling(options)
    from cheaper.language_model import load_model

    if options.file:
        prompts = list(_prompts(options.file, options.chat))
        model = load_model(options.model, options.tokenizer)
        settings = {key: getattr(options, key) for key in ("max_new_tokens", "temperature", "top_p", "stop")}
        with open(options.output, "w") if options.output else open(sys.stdout.fileno(), "w", closefd=False) as file:
            for number, some in enumerate(_batches(prompts, options.batch_size)):
                # Of a seed of its own: the same prompts in another batch are to be drawn anew.
                texts = model.generate(some, **settings, seed=options.seed + number)
                for prompt, text in zip(some, texts, strict=True):
                    key = "prompt" if isinstance(prompt, str) else "messages"
                    file.write(json.dumps({key: prompt, "continuation": text}, ensure_ascii=False) + "\n")
                file.flush()
        return 0
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    model = load_model(options.model, options.tokenizer)
    _show(model.stream([{"role": "user", "content": text}] if options.chat else text, sampling, options.stop))
    return 0


def chat(args: list[str]) -> int:
    """Talks with a model until the end of the input (Ctrl-D)."""
    parser = ArgumentParser(prog="cheaper chat")
    _add_model(parser)
    parser.add_argument("--system", help="what the model is told before the first turn")
    _add_sampling(parser)
    options = parser.parse_args(args)
    from cheaper.language_model import load_model

    model = load_model(options.model, options.tokenizer)
    start = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(start)
    print("An empty line begins a new chat, Ctrl-C stops an answer, Ctrl-D ends it.", file=sys.stderr)
    while True:
        try:
            said = input("you: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not said.strip():
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        print("model: ", end="")
        try:
            answer = _show(model.stream(messages, _sampling(options), options.stop))
        except KeyboardInterrupt:
            print("\nThe answer was stopped; what was asked last is forgotten.", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def evaluate(args: list[str]) -> int:
    """Scores a model on benchmarks: a table, and ``evaluation.json`` in the run folder."""
    parser = ArgumentParser(prog="cheaper evaluate")
    parser.add_argument("--model_path", required=True, help="a run, a checkpoint, a transformers folder or a hub id")
    parser.add_argument("--benchmarks", default="base", help="suites (base, final), benchmarks or tasks of the harness")
    parser.add_argument("--data_dir", type=Path, help="local copies of the data sets; by default they are the hub's")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, help="of each answer; by default the benchmark's number")
    parser.add_argument("--samples", type=int, help="answers to each question, where a benchmark averages over several")
    parser.add_argument("--tokenizer", help="instead of the model's own: a folder, a hub id or a tiktoken .model file")
    parser.add_argument("--seed", type=int, default=1234, help="of examples and draws; by default the harness's")
    parser.add_argument(
        "--execute_code", action="store_true", help="run the programs that the model writes, in a sandbox"
    )
    parser.add_argument("--output", type=Path, help="by default evaluation.json in the model's folder")
    options = parser.parse_args(args)
    for key in ("limit", "batch_size", "max_new_tokens", "samples"):
        if (given := getattr(options, key)) is not None and given < 1:
            raise UserError(f"--{key} {given}: expected 1 or more")
    if options.data_dir and not options.data_dir.is_dir():
        raise UserError(f"--data_dir {options.data_dir}: no such folder")
    if options.output and not options.output.absolute().parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.absolute().parent}")
    from cheaper.evaluation import evaluator
    from cheaper.evaluation.processes import is_first
    from cheaper.evaluation.results import check_output, results_file, save, table

    names = [name for name in options.benchmarks.split(",") if name]
    benchmarks = evaluator.chosen(names, options.execute_code, options.samples)
    generation = options.tokenizer, options.batch_size, options.max_new_tokens, options.seed
    lm = evaluator.load(options.model_path, *generation)
    output = options.output or results_file(options.model_path, lm.model.source)
    check_output(output)
    tasks = evaluator.load_all_tasks(benchmarks, options.data_dir, options.seed)
    results = []
    for result in evaluator.results(lm, benchmarks, tasks, options.limit, options.seed):
        results.append(result)
        if is_first():
            save(output, lm.model.source, [result])
    if is_first():
        print(f"{table(results)}\n\n{output}")
    return 0


def export(args: list[str]) -> int:
    """Writes a model for transformers or llama.cpp."""
    parser = ArgumentParser(prog="cheaper export")
    _add_model(parser)
    parser.add_argument("--to", choices=["hf", "gguf"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="a new folder, or for gguf a new file")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights; as they are by default")
    options = parser.parse_args(args)
    from cheaper.interchange import export_to_gguf, export_to_hf
    from cheaper.language_model import load_model

    write = {"hf": export_to_hf, "gguf": export_to_gguf}[options.to]
    write(load_model(options.model, options.tokenizer, device="cpu"), options.output, options.dtype)
    print(options.output)
    return 0


def import_(args: list[str]) -> int:
    """Makes a run folder of a model of transformers, to start stages from."""
    parser = ArgumentParser(prog="cheaper import")
    _add_model(parser)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    options = parser.parse_args(args)
    from cheaper.interchange import import_model
    from cheaper.language_model import load_model

    import_model(load_model(options.model, options.tokenizer, device="cpu"), options.output)
    print(f"{options.output}; its shape, for yamls/model, is in {options.output}/model.yaml")
    return 0


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a checkpoint, a transformers folder or a hub id")
    parser.add_argument("--tokenizer", help="instead of the model's own: a folder, a hub id or a tiktoken .model file")


def _add_sampling(parser: ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token each time")
    parser.add_argument("--top_p", type=float, default=1.0, help="mass of the most likely words that are drawn from")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="where to end; may be repeated")
    parser.add_argument("--seed", type=int, default=0)


def _sampling(options: argparse.Namespace) -> Any:
    from cheaper.generation import Sampling

    return Sampling(options.max_new_tokens, options.temperature, options.top_p, seed=options.seed)


def _show(pieces: Iterable[str]) -> str:
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _prompts(path: Path, as_chat: bool) -> Iterator[Any]:
    """The prompts of a file, line by line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of lines, such as U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line) if path.suffix in (".jsonl", ".json") else {"prompt": line}
            prompt = row["messages"] if "messages" in row else row["prompt"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--file {path}, line {number}: expected JSON with prompt or messages") from None
        yield [{"role": "user", "content": prompt}] if as_chat and isinstance(prompt, str) else prompt


def _batches(prompts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(prompts)
    while some := list(islice(iterator, size)):
        yield some
