"""One of four processes is killed: the run ends soon, says why, leaves nothing behind, and goes on when asked."""

import time

import psutil

from cheaper.data.shared_memory import stale_shared_memory
from cheaper.files import newest_checkpoint, read_records
from tests.conftest import finish, start
from tests.e2e.test_resume import wait_for_step


def test_a_killed_process_takes_the_run_down(corpus, tmp_path):
    before = stale_shared_memory()
    run = tmp_path / "run"
    arguments = corpus.arguments(run, "distributed=fsdp2", "data.num_workers=1", "training.stage.batch_size_per_gpu=1")
    launcher = start(arguments, processes=4, SLOW="0.2")
    wait_for_step(run, 13, launcher)
    family = psutil.Process(launcher.pid).children(recursive=True)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 4
    assert len(family) >= 8  # and a process that loads data for each
    killed = time.monotonic()
    ranks[2].kill()
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    lines = [line for line in output.splitlines() if line.startswith("error: rank")]
    assert 1 <= len(lines) <= 3
    assert all("has lost another process of the run" in line for line in lines)
    assert "cheaper/cli.py" not in output  # no traceback of ours
    _, alive = psutil.wait_procs(family, timeout=max(0, 60 - (time.monotonic() - killed)))
    assert alive == []
    assert set(stale_shared_memory()) <= set(before)
    assert newest_checkpoint(run).name == "step-00000010"
    finish(start([*arguments, "training.resume=true"], processes=4))
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == list(range(1, 42))
