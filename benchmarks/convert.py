"""Conversion against the bare tokenizer: raw JSONL to finished shards, tokens per second as a ratio.

    python benchmarks/convert.py --tokenizer path/to/llama3/tokenizer.model [--megabytes 100] [--rounds 5]

The text is real: the sources and documents of the installed Python packages. Sides alternate within one run. Before
timing, the ids in the shards are compared with those of the bare tokenizer. Prints a table, writes
``benchmarks/results/convert.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import tiktoken
import tokenizers

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
                texts.append(path.read_text(encoding="utf-8"))
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


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def compare(rounds: int, ours: Callable[[], object], theirs: Callable[[], object], tokens: int) -> dict[str, object]:
    """Times both sides in turn; the ratio is taken pair by pair."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    return {
        "ours_tokens_per_second": round(tokens / statistics.median(a for a, _ in pairs)),
        "theirs_tokens_per_second": round(tokens / statistics.median(b for _, b in pairs)),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min_max": [round(ratios[0], 3), round(ratios[-1], 3)],
        "tokens": tokens,
    }


def check_ids(root: Path, expected: list[list[int]]) -> None:
    from streaming import StreamingDataset  # brings PyTorch, which each worker would import with this file

    dataset = StreamingDataset(local=str(root / "s"), shuffle=False, batch_size=1)
    ids = np.concatenate([dataset[i]["input_ids"] for i in range(len(dataset))])
    flat = np.concatenate([np.array([0, *document, 0]) for document in expected])
    assert len(ids) == len(flat)
    inside = np.ones(len(flat), bool)
    ends = np.cumsum([len(document) + 2 for document in expected])
    inside[ends - 1] = inside[np.concatenate([[0], ends[:-1]])] = False
    assert np.array_equal(ids[inside], flat[inside])


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
    for name, size, opened in (("100 MB", 1e8, open), ("1 GB", 1e9, open), ("1 GB, gz", 1e9, gzip.open)):
        big = folder / ("big.jsonl.gz" if opened is gzip.open else "big.jsonl")
        with opened(big, "wb") as file:
            for _ in range(round(size / path.stat().st_size)):
                file.write(path.read_bytes())
        memory[name] = round(peak_memory(big, options.tokenizer, folder / "mds") / 1e6)
        print(f"peak memory of all processes, {name} of input: {memory[name]} MB", flush=True)
    shutil.rmtree(folder)

    report = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/convert.py --megabytes {options.megabytes:g} --rounds {options.rounds}",
        "hardware": f"{CORES} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("tiktoken", "tokenizers", "mosaicml-streaming")},
        "python": sys.version.split()[0],
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6),
        "peak_resident_megabytes_of_all_processes_by_input": memory,
        "results": results,
    }
    target = Path(__file__).parent / "results" / "convert.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    for name, result in results.items():
        low, high = result["ratio_min_max"]
        ours, theirs = result["ours_tokens_per_second"] / 1e6, result["theirs_tokens_per_second"] / 1e6
        print(f"{name:<68} {ours:6.2f}M vs {theirs:6.2f}M tokens/s   ratio {result['ratio_median']} ({low}-{high})")


if __name__ == "__main__":
    main()
