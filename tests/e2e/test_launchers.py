"""``scripts/train.py`` under the launcher that the README names; torchrun and python are used in ``test_resume``."""

import os
import subprocess
import sys
from pathlib import Path

from cheaper.files import read_records
from tests.conftest import REPOSITORY


def test_composer_with_two_processes(corpus, tmp_path):
    run = tmp_path / "run"
    launcher = Path(sys.executable).with_name("composer")
    command = [launcher, "-n", "2", "scripts/train.py", *corpus.arguments(run, "training.stage.tokens=1024")]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 × " in done.stdout
    assert read_records(run / "metrics.jsonl")[-1]["tokens"] == 1024
