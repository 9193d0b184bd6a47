"""From Python: a small corpus, a small model trained on it, and what it says.

    python examples/train_and_ask.py [--tokens 100K] [--data_dir FOLDER]

Writes below ``data/`` and ``runs/`` of the current folder. ``--data_dir`` has local copies of benchmarks' data sets,
here of ARC; without it nothing is evaluated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cheaper import build_trainer, evaluate, generate, load_config, load_model
from cheaper.data.convert import convert_mixture
from cheaper.data.sample import write_sample

RECIPE = Path(__file__).parents[1] / "yamls" / "quickstart" / "phase1.yaml"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="100K", help="to train on")
    parser.add_argument("--data_dir", help="local copies of benchmarks' data sets")
    options = parser.parse_args()

    # A run is a recipe and overrides, as on the command line.
    config = load_config([str(RECIPE), f"training.stage.tokens={options.tokens}", "run_name=example"])
    write_sample(Path("data/sample"))
    convert_mixture(config.data, config.data.row_length)

    # Composer's trainer: fit() trains, checkpoints and metrics are in config.training.checkpoint_dir.
    trainer = build_trainer(config)
    trainer.fit()
    trainer.close()

    # A run's folder is a model, like a transformers folder or a hub id.
    model = load_model(config.training.checkpoint_dir)
    prompts = ["Question: What is 2 + 3 + 4?\n", "def "]
    for prompt, text in zip(prompts, generate(model, prompts, max_new_tokens=32), strict=True):
        print(repr(prompt + text))
    if options.data_dir:
        for result in evaluate(model, ["arc_easy"], data_dir=options.data_dir, limit=100):
            print(f"{result.benchmark}: {result.score:.3f} of {result.samples} questions")


if __name__ == "__main__":
    main()
