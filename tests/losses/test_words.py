"""Losses whose words are divided over processes are those of one process. Real processes on gloo, fp32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("processes", [2, 3])
def test_losses_and_gradients_of_a_divided_vocabulary(processes):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = Path(__file__).with_name("losses_over_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout)
    assert len(differences) == 9
    assert {name: value for name, value in differences.items() if value > 1e-4} == {}
