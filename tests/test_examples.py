"""The examples run, as a reader would run them."""

import subprocess
import sys

from tests.conftest import REPOSITORY
from tests.evaluation.conftest import data_dir  # noqa: F401  a fixture


def test_train_and_ask(tmp_path, data_dir):  # noqa: F811
    command = [sys.executable, str(REPOSITORY / "examples" / "train_and_ask.py"), "--tokens", "20K"]
    done = subprocess.run([*command, "--data_dir", str(data_dir)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.splitlines()[-3:]
    assert last[0].startswith("'Question: What is 2 + 3 + 4?")
    assert last[1].startswith("'def ")
    assert last[2].startswith("arc_easy: 0.")
    assert (tmp_path / "runs" / "example" / "summary.json").exists()
