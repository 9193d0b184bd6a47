"""Kills a run again and again at random moments and compares it with one that was never stopped.

    python -m tests.e2e.kill_repeatedly --kills 50 [--processes 2] [--seed 0]

Each life is killed (SIGKILL, all its processes) at a random moment: while it starts, in a step, in a save (there is a
checkpoint every second step). Checked at the end: the same samples in the same order on every rank, the same loss at
every step and the same final weights, bit for bit; no partial file, no shared memory left, every shard still there.

Conversions are killed by a test of theirs: ``KILL_SEEDS=25 pytest tests/data/test_convert.py -k killed_at_random``.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from cheaper.data.shared_memory import stale_shared_memory
from cheaper.files import newest_checkpoint
from tests.conftest import Corpus, finish, kill, start
from tests.e2e.test_resume import assert_same_runs


def kill_repeatedly(corpus: Corpus, folder: Path, kills: int, processes: int, seed: int) -> dict[str, int]:
    """Runs the whole comparison; returns how many kills hit a start, a run between checkpoints, and a save.

    Raises:
        AssertionError: The killed run differs from the one that was never stopped.
    """
    rng = random.Random(seed)
    shards = sorted(path.name for path in corpus.folder.rglob("*.mds"))
    stale = set(stale_shared_memory())
    steps = 20 + 25 * kills
    settings = [
        f"training.stage.tokens={128 * steps}",
        f"training.stage.batch_size_per_gpu={4 // processes}",
        "training.checkpoint_interval=2",
        "training.samples.prompts=[]",
    ]
    whole, killed = folder / "whole", folder / "killed"
    finish(start(corpus.arguments(whole, *settings), processes))
    hits = {"starting": 0, "training": 0, "saving": 0}
    for _ in range(kills):
        resume = ["training.resume=true"] if newest_checkpoint(killed) else []
        log = killed / "samples-0.log"
        size = log.stat().st_size if log.exists() else 0
        life = start(corpus.arguments(killed, *settings, *resume), processes, SLOW="0.08")
        moment = rng.random()
        if moment < 0.2:
            time.sleep(rng.uniform(0, 8))
        else:
            while not (log.exists() and log.stat().st_size > size):
                assert life.poll() is None, life.communicate()[0][-3000:]
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 2))
        if moment > 0.6:  # wait for the next save
            until = time.monotonic() + 2
            while time.monotonic() < until and not list(killed.glob(".partial*")):
                pass
        started = log.exists() and log.stat().st_size > size
        kill(life)
        saving = bool(list(killed.glob(".partial*")))
        hits["saving" if saving else "training" if started else "starting"] += 1
    resume = ["training.resume=true"] if newest_checkpoint(killed) else []
    finish(start(corpus.arguments(killed, *settings, *resume), processes))
    assert_same_runs(killed, whole, processes)
    assert sorted(path.name for path in corpus.folder.rglob("*.mds")) == shards
    assert set(stale_shared_memory()) <= stale
    assert not list(killed.glob(".partial*"))
    return hits


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        small = Corpus(Path(temporary, "corpus"))
        begin = time.time()
        result = kill_repeatedly(small, Path(temporary), options.kills, options.processes, options.seed)
    seconds = time.time() - begin
    print(f"{options.kills} kills, {options.processes} processes, {seconds:.0f} s: equal bit for bit; {result}")
