"""What training from a teacher cache loses against the teacher itself, and what it saves: k = 12, 50, 256, both kinds.

    make quickstart && python benchmarks/teacher_cache.py [--bytes 200000]

Takes the quickstart's teacher, its student after phase 2, and the beginning of its corpus, so many bytes of each
stream. The student passes once over it, the same rows in the same order: with the teacher in memory, from caches, and
from the text alone. Prints held-out losses (nats per token, mean of the three held-out sets), the gap to the teacher in
memory and the cache's bytes per token; writes ``benchmarks/results/teacher-cache.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RAW = Path("data/sample/raw").resolve()
STREAMS = ("english", "code", "math")
RECIPE = """
defaults:
  [{model: tiny}, {training: midtrain}, {data: beginning}, {distributed: single_gpu}, {logging: console}, _self_]
training:
  stage: {tokens: null, epochs: 1, sequence_length: 128, batch_size_per_gpu: 4, learning_rate: 1.0e-3, warmup: 0}
  samples: {prompts: []}
  targets: []
  expected: {}
"""


def write_recipe(folder: Path, size: int) -> Path:
    """The beginning of each stream, taken whole and in order, so that every run sees the same rows."""
    lines = [
        f"name: beginning\nroot: {folder}/mds\ntokenizer: {Path('data/sample/tokenizer').resolve()}\nnum_workers: 0"
    ]
    lines += ["shuffle: false\nstreams:"]
    for name in STREAMS:
        with open(RAW / f"{name}.jsonl", encoding="utf-8") as source, open(folder / f"{name}.jsonl", "w") as part:
            while part.tell() < size:
                part.write(source.readline())
        lines.append(f"  {name}: {{source: {{path: {folder}/{name}.jsonl}}}}")
    lines.append("held_out:")
    lines += [f"  held_out_{name}: {{source: {{path: {RAW}/held_out_{name}.jsonl}}}}" for name in STREAMS]
    (folder / "data").mkdir()
    (folder / "data" / "beginning.yaml").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def cheaper(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "cheaper.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def train(recipe: Path, name: str, student: Path, *overrides: str) -> dict[str, float]:
    run = recipe.parent / name
    start = [f"training.checkpoint_path={student}", f"training.checkpoint_dir={run}", f"run_name={name}"]
    cheaper("train", str(recipe), *start, *overrides)
    summary = json.loads((run / "summary.json").read_text())
    losses = [summary["held_out"][f"eval/held_out_{stream}/loss"] for stream in STREAMS]
    return {"held_out_loss": sum(losses) / len(losses), "tokens": summary["tokens"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=200_000, help="of each stream")
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart-teacher"))
    parser.add_argument("--student", type=Path, default=Path("runs/quickstart-phase2"))
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "teacher-cache.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="teacher-cache-") as temporary:
        recipe = write_recipe(Path(temporary), options.bytes)
        cheaper("convert", str(recipe))
        teacher = f"training.teacher_model={options.teacher.resolve()}"
        results = {
            "teacher in memory": train(recipe, "online", options.student, teacher),
            "text alone": train(recipe, "text", options.student, "training.teacher_model=null"),
        }
        for kind in ("top_k", "sampled"):
            for k in (12, 50, 256):
                folder = Path(temporary) / f"{kind}-{k}"
                cached = [teacher, f"training.teacher_cache={folder}"]
                cheaper("cache-teacher", str(recipe), *cached, "--kind", kind, "--k", str(k))
                result = train(recipe, f"from-{kind}-{k}", options.student, *cached)
                size = sum(file.stat().st_size for file in folder.rglob("*.mds*"))
                results[f"{kind} {k}"] = {**result, "bytes_per_token": size / result["tokens"]}
    online = results["teacher in memory"]
    print(f"{'':<20}{'held-out loss':>14}{'gap':>10}{'bytes/token':>13}")
    for name, result in results.items():
        result["gap"] = result["held_out_loss"] - online["held_out_loss"]
        size = f"{result['bytes_per_token']:.1f}" if "bytes_per_token" in result else ""
        print(f"{name:<20}{result['held_out_loss']:>14.4f}{result['gap']:>+10.4f}{size:>13}")
    conditions = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} CPU",
        "vocabulary": 4096,
        "bytes_of_each_stream": options.bytes,
    }
    options.output.write_text(json.dumps({**conditions, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
