"""The model card that goes with exported weights: what made them, from what, and how well they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cheaper.checkpoints import is_checkpoint
from cheaper.evaluation.results import results_of
from cheaper.files import newest_checkpoint
from cheaper.models.decoder import Decoder

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```"""


def model_card(decoder: Decoder, source: Path, name: str) -> str:
    """A card in Markdown.

    Args:
        decoder: The model.
        source: Its checkpoint, of whose run the card tells, or its folder.
        name: Of the folder that the card lies in.
    """
    shape, parameters = decoder.config, sum(parameter.numel() for parameter in decoder.parameters())
    context = f"a context of {shape.max_position_embeddings:,} tokens"
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""),
        *(f"# {name}", ""),
        f"A decoder of {parameters:,} parameters: {shape.num_layers} layers of width {shape.hidden_size:,}, "
        f"{shape.vocab_size:,} words, {context} (`rope_theta` {shape.rope_theta:g}).",
        *("", USE.format(name=name), ""),
    ]
    folder = source.parent if is_checkpoint(source) else source
    run = _read(folder / "run.yaml")
    summary = _read(folder / "summary.json") if source == newest_checkpoint(folder) else {}  # of the end of the run
    results = results_of(folder / "evaluation.json", source)
    if "training" in run:
        lines += ["## Training", "", *_table(_training(run, summary)), ""]
    if summary.get("mixture"):
        mixture = [("stream", "tokens", "share", "asked")]
        for stream, of in summary["mixture"].items():
            mixture.append((stream, f"{of['tokens']:,}", f"{of['consumed']:.2%}", f"{of['asked']:.2%}"))
        lines += ["## Data", "", *_table(mixture), ""]
    figures = [(held.removeprefix("eval/"), f"{value:.4f}") for held, value in summary.get("held_out", {}).items()]
    figures += [(row["benchmark"], f"{row['score']:.1%}") for row in results]
    if figures:
        lines += ["## Results", "", *_table([("", ""), *figures]), ""]
    return "\n".join(lines)


def _training(run: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    stage = run["training"]["stage"]
    rows = {
        "recipe": " ".join(f"{group}={run[group]['name']}" for group in ("model", "training", "data", "distributed")),
        "started from": run["training"].get("checkpoint_path"),
        "teacher": run["training"].get("teacher_model"),
        "tokens": f"{summary['tokens']:,} in {summary['steps']:,} steps" if summary else None,
        "rows": f"{stage['sequence_length']:,} tokens, {stage['batch_size_per_gpu']} at once on each device",
        "peak learning rate": f"{stage['learning_rate']:g}",
        "last loss": summary.get("loss"),
        "devices": summary.get("devices"),
        "precision": summary.get("precision"),
    }
    return [("", ""), *((name, str(value)) for name, value in rows.items() if value is not None)]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text())


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + " --- |" * len(rows[0]), *others]
