"""Conversion, raw JSONL to finished shards, against the bare tokenizer and llm-foundry: tokens per second as a ratio.

    python benchmarks/convert.py --tokenizer path/to/llama3/tokenizer.model [--megabytes 100] [--rounds 5]

The text is real: the sources and documents of the installed Python packages. Sides alternate within one run, after one
round that does not count. Before timing, the ids in the shards are compared with those of the bare tokenizer, and those
in llm-foundry's shards with ours. llm-foundry's conversion runs in a process of its own, with an empty cache of
``datasets``; both sides read the same Hugging Face folder, made of Llama 3's vocabulary by transformers'
``TikTokenConverter``. Prints a table, writes ``benchmarks/results/convert.json``.

The peer's environment, made from the repository's root::

    UV_PROJECT_ENVIRONMENT=/tmp/foundry uv sync --frozen --no-default-groups --extra foundry --no-install-project
    uv pip install --python /tmp/foundry/bin/python "setuptools<81"  # llm-foundry imports pkg_resources
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import tiktoken
import tokenizers
from peers.turns import Peer, version_of

from cheaper.config import DataConfig, SourceConfig, StreamConfig
from cheaper.data.convert import convert_mixture
from cheaper.data.sample import write_sample
from cheaper.data.tokenize import load_tokenizer

SUFFIXES = {".py", ".md", ".rst", ".txt", ".pyi", ".h", ".hpp", ".json"}
CORES = os.cpu_count()


def real_texts(megabytes: float) -> list[str]:
    """Text files below the installed packages, in order, up to a size."""
    texts, size = [], 0
    for path in sorted(Path(tiktoken.__file__).parents[1].rglob("*")):
        if path.suffix in SUFFIXES and path.is_file() and 200 < path.stat().st_size < 2_000_000:
            with contextlib.suppress(UnicodeDecodeError):
                text = path.read_text(encoding="utf-8")
                if "<|" not in text:  # llm-foundry takes a special token that text spells for one
                    texts.append(text)
                    size += path.stat().st_size
        if size > megabytes * 1e6:
            return texts
    return texts


def write(path: Path, texts: list[str]) -> Path:
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def convert(path: Path, tokenizer: str, root: Path) -> int:
    """Converts with all cores; returns the number of tokens without BOS and EOS."""
    shutil.rmtree(root, ignore_errors=True)
    stream = StreamConfig(proportion=1.0, source=SourceConfig(path=str(path)))
    data = DataConfig(name="benchmark", root=str(root), tokenizer=tokenizer, streams={"s": stream})
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        manifest = convert_mixture(data, 2048)["s"]
    return manifest.tokens - 2 * manifest.documents


def compare(rounds: int, ours: Callable[[], object], theirs: Callable[[], object], tokens: int) -> dict[str, object]:
    """Tokens per second of both sides, and the ratio."""
    from side_by_side import alternate, speed_ratio, spread  # brings PyTorch: workers would import it with this file

    times = alternate({"ours": ours, "theirs": theirs}, rounds)
    speeds = {f"{side}_tokens_per_second": spread([tokens / each for each in times[side]]) for side in times}
    return {**speeds, "ratio": speed_ratio(times["theirs"], times["ours"]), "tokens": tokens}


def check_ids(root: Path, expected: list[list[int]]) -> None:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(root / "s"), shuffle=False, batch_size=1)
    ids = np.concatenate([dataset[i]["input_ids"] for i in range(len(dataset))])
    flat = np.concatenate([np.array([0, *document, 0]) for document in expected])
    assert len(ids) == len(flat)
    inside = np.ones(len(flat), bool)
    ends = np.cumsum([len(document) + 2 for document in expected])
    inside[ends - 1] = inside[np.concatenate([[0], ends[:-1]])] = False
    assert np.array_equal(ids[inside], flat[inside])


def hugging_face_folder(model: str, folder: Path) -> str:
    """Llama 3's vocabulary as ``transformers`` keeps it."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = list(load_tokenizer(model).special_tokens)
    made = TikTokenConverter(model, additional_special_tokens=special).converted()
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **ends).save_pretrained(folder)
    return str(folder)


def check_llm_foundry(root: Path, theirs: Path) -> None:
    """Its rows are ours, but for the last, which it leaves out if it is not full."""
    from streaming import StreamingDataset

    ours = StreamingDataset(local=str(root / "s"), shuffle=False, batch_size=1)
    rows = StreamingDataset(local=str(theirs), shuffle=False, batch_size=1)
    assert len(rows) == len(ours) - (len(ours[len(ours) - 1]["input_ids"]) < 2048)
    assert all(np.array_equal(rows[i]["tokens"], ours[i]["input_ids"]) for i in range(len(rows)))


def peak_memory(path: Path, tokenizer: str, root: Path) -> int:
    """Converts in a fresh process; returns the highest sum of resident bytes over it and its workers."""
    process = psutil.Popen([sys.executable, __file__, "--only_convert", path, "--tokenizer", tokenizer, "--root", root])
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", required=True, help="Llama 3's tiktoken .model file")
    parser.add_argument(
        "--foundry", default="/tmp/foundry/bin/python", help="the interpreter of llm-foundry's environment"
    )
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only_convert", type=Path, help=argparse.SUPPRESS)  # what peak_memory measures
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_convert:
        convert(options.only_convert, options.tokenizer, options.root)
        return
    folder = Path(tempfile.mkdtemp(prefix="benchmark-convert-"))
    texts = real_texts(options.megabytes)
    path = write(folder / "text.jsonl", texts)
    results: dict[str, object] = {}

    engine = load_tokenizer(options.tokenizer).engine
    expected = engine.encode_ordinary_batch(texts, num_threads=CORES)
    tokens = convert(path, options.tokenizer, folder / "mds")
    check_ids(folder / "mds", expected)
    results["Llama 3, against tiktoken encode_ordinary_batch"] = compare(
        options.rounds,
        lambda: convert(path, options.tokenizer, folder / "mds"),
        lambda: engine.encode_ordinary_batch(texts, num_threads=CORES),
        tokens,
    )
    del expected

    llama3 = hugging_face_folder(options.tokenizer, folder / "llama3")
    tokens = convert(path, llama3, folder / "mds")
    foundry = Peer(options.foundry, "foundry_convert.py", path, llama3, folder / "foundry")
    foundry()
    check_llm_foundry(folder / "mds", folder / "foundry" / "mds")
    results["Llama 3, against llm-foundry's conversion"] = compare(
        options.rounds, lambda: convert(path, llama3, folder / "mds"), foundry, tokens
    )
    foundry.stop()

    write_sample(folder / "sample")
    own = str(folder / "sample" / "tokenizer")
    raw = json.loads(Path(own, "tokenizer.json").read_text())
    Path(own, "tokenizer.json").write_text(json.dumps({**raw, "normalizer": {"type": "NFC"}}))  # tiktoken has none
    assert isinstance(load_tokenizer(own).engine, tokenizers.Tokenizer)
    library = tokenizers.Tokenizer.from_file(f"{own}/tokenizer.json")
    library.encode_special_tokens = True
    expected = [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
    tokens = convert(path, own, folder / "mds")
    check_ids(folder / "mds", expected)
    results["a tokenizer that only tokenizers runs, against encode_batch_fast"] = compare(
        options.rounds,
        lambda: convert(path, own, folder / "mds"),
        lambda: library.encode_batch_fast(texts, add_special_tokens=False),
        tokens,
    )
    del expected

    joined = "\n".join(texts)[:20_000_000]
    cut = [joined[i : i + 4000] for i in range(0, len(joined), 4000)]
    long, short = write(folder / "long.jsonl", [joined] * CORES), write(folder / "short.jsonl", cut * CORES)
    tokens = convert(long, options.tokenizer, folder / "mds")
    results["a 20 MB document per core, against the same text in 4 kB documents"] = compare(
        options.rounds,
        lambda: convert(long, options.tokenizer, folder / "mds"),
        lambda: convert(short, options.tokenizer, folder / "mds"),
        tokens,
    )
    memory = {}
    megabytes = options.megabytes
    for name, size, opened in (
        (f"{megabytes:g} MB", megabytes, open),
        (f"{10 * megabytes:g} MB", 10 * megabytes, open),
        (f"{10 * megabytes:g} MB, gz", 10 * megabytes, gzip.open),
    ):
        big = folder / ("big.jsonl.gz" if opened is gzip.open else "big.jsonl")
        with opened(big, "wb") as file:
            for _ in range(round(size * 1e6 / path.stat().st_size)):
                file.write(path.read_bytes())
        memory[name] = round(peak_memory(big, options.tokenizer, folder / "mds") / 1e6)
        print(f"peak memory of all processes, {name} of input: {memory[name]} MB", flush=True)
    shutil.rmtree(folder)

    report = {
        "peers": {"llm-foundry": version_of("llm-foundry", options.foundry)},
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6),
        "peak_resident_megabytes_of_all_processes_by_input": memory,
        "results": results,
    }
    from side_by_side import save, show

    save("convert", report, ("tiktoken", "tokenizers", "mosaicml-streaming"))
    table = [("conversion", "ours", "theirs", "ratio", "least to most")]
    for name, result in results.items():
        speeds = [f"{result[f'{side}_tokens_per_second']['median'] / 1e6:.2f}M" for side in ("ours", "theirs")]
        ratio = result["ratio"]
        table.append((name, *speeds, f"{ratio['median']:.2f}", f"{ratio['min']:.2f}–{ratio['max']:.2f}"))
    show(table)


if __name__ == "__main__":
    main()
