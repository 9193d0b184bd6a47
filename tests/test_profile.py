"""``training.profile``: what it writes about a run."""

import json
from types import SimpleNamespace

import pytest
from composer.profiler import ProfilerAction

from cheaper.profiling import BARS, SLICES, build_profiler, is_step, memory_timeline
from tests.test_training import train


def profiled(corpus, run, steps: int, *overrides: str):
    """The folder with the profile of a run of so many steps."""
    tokens = f"training.stage.tokens={steps * 4 * 30}"  # rows are 30 tokens on average, or a few more
    assert train(corpus.arguments(run, tokens, "training.profile=true", *overrides)) == 0
    return run / "profile"


@pytest.fixture(scope="module")
def profile(corpus, tmp_path_factory):
    return profiled(corpus, tmp_path_factory.mktemp("profiled") / "run", 10)


def test_the_trace_has_three_steps_with_their_operations(profile):
    events = json.loads((profile / "rank0.json").read_text())["traceEvents"]
    steps = [event for event in events if is_step(event)]
    assert [step["name"] for step in steps] == ["ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"]
    operations = {event["name"] for event in events if event.get("cat") == "cpu_op"}
    assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= operations


def test_the_page_names_the_operations_and_the_peak_of_each_step(profile):
    lines = (profile / "rank0.txt").read_text().splitlines()
    assert lines[0] == "3 steps on the processor"
    for line in lines[2:5]:
        name, milliseconds, _, mebibytes, *_, timeline = line.split()
        assert name.startswith("ProfilerStep#")
        assert float(milliseconds) > 0
        assert float(mebibytes) > 0
        assert len(timeline) == SLICES
        assert len(set(timeline) & set(BARS)) > 3  # memory comes and goes
    products = next(line for line in lines if line.startswith("aten::mm "))
    _, milliseconds, share, calls, _ = products.split()
    # Of 2 blocks 7 matrices forward, twice as many backward; 3 of the output matrix.
    assert float(calls) == 2 * 7 * 3 + 3
    assert 0 < float(share.rstrip("%")) < 100
    assert len(lines) <= 40  # a page


def test_memory_stays_until_it_changes():
    def memory(time: float, total: int, device: int = 0) -> dict:
        return {"name": "[memory]", "ts": time, "args": {"Total Allocated": total, "Device Type": device}}

    # Slices of one microsecond; a peak within one; another device; what stands when the step begins and ends.
    trace = [memory(90, 7), memory(101.5, 9), memory(101.6, 30), memory(101.7, 5), memory(102, 99, 1), memory(140, 2)]
    timeline = memory_timeline(trace, {"ts": 100, "dur": SLICES}, on_gpu=False)
    assert timeline == [7, 30, *[5] * 38, *[2] * 8]


def test_the_end_of_a_run_ends_the_recording(corpus, tmp_path):
    assert (profiled(corpus, tmp_path / "four", 4) / "rank0.txt").exists()
    assert not (profiled(corpus, tmp_path / "two", 2) / "rank0.txt").exists()


def test_later_epochs_are_not_recorded(tmp_path):
    profiler = build_profiler(tmp_path)
    sixth = SimpleNamespace(timestamp=SimpleNamespace(batch_in_epoch=5), profiler=None, dataloader_len=None)
    assert profiler.schedule(sixth) == ProfilerAction.ACTIVE_AND_SAVE
    profiler.trace_handlers[0].written = True
    assert profiler.schedule(sixth) == ProfilerAction.SKIP


def test_a_run_goes_on_with_and_without(corpus, tmp_path):
    run = tmp_path / "run"
    profiled(corpus, run, 8, "training.checkpoint_interval=5")
    sorted(run.glob("step-*"))[-1].unlink()
    resumed = corpus.arguments(
        run, "training.stage.tokens=960", "training.checkpoint_interval=5", "training.resume=true"
    )
    assert train(resumed) == 0
    sorted(run.glob("step-*"))[-1].unlink()
    (run / "profile" / "rank0.txt").unlink()
    assert train([*resumed, "training.profile=true"]) == 0
    assert (run / "profile" / "rank0.txt").exists()
