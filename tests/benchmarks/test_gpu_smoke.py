"""The benchmark of GPUs runs from one end to the other, on a CPU with small sizes."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY

ABSENT = {"fp8": "there is no GPU", "Liger": "No module named 'liger_kernel'", "FlexAttention": "on CPU"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose kernels would be measured")
def test_every_part_gives_its_rows():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--smoke"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    parts = done.stdout.strip().split("\n\n")
    heads = [part.split()[0] for part in parts]
    assert heads == ["correctness", "training", "ablation", "attention", "distillation", "teachers"]
    assert parts[0].count("True") == 8
    for line in done.stdout.splitlines():
        if line.startswith("  "):  # why there is no figure
            assert any(name in line and reason in line for name, reason in ABSENT.items()), line
    assert "speed ratio" in parts[1]
