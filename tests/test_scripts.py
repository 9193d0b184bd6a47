"""The stages' scripts one after the other, as a user runs them: with Composer's launcher, and no checkpoint named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from cheaper.compose import leaves
from cheaper.files import read_records
from tests.conftest import REPOSITORY, Corpus


def test_a_script_starts_from_what_the_one_before_left(corpus: Corpus, tmp_path):
    for folder in ("scripts", "yamls"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    shutil.copy(corpus.folder / "data" / "small.yaml", tmp_path / "yamls" / "data")
    settings = yaml.safe_load((corpus.folder / "recipe.yaml").read_text())
    del settings["defaults"]
    small = ["model=tiny", "data=small", *(f"{key}={value}" for key, value in leaves(settings))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    for script in ("run_phase1.sh", "run_phase2.sh"):
        command = [tmp_path / "scripts" / script, *small]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    before, after = (read_records(tmp_path / "runs" / f"tiny-pretrain_phase{n}" / "metrics.jsonl") for n in (1, 2))
    assert after[0]["train/loss"] < before[0]["train/loss"] - 0.5
