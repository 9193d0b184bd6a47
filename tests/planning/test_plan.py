"""Plans: what fits, what it costs, and what is refused."""

import re
from dataclasses import replace

import pytest

from cheaper import cli
from cheaper.compose import load_config
from cheaper.planning.hardware import Hardware, all_hardware, load_hardware, recognise
from cheaper.planning.memory import plan_memory
from cheaper.planning.plan import find, make_plan, overrides, table
from tests.conftest import REPOSITORY

PHASE1 = ["training=pretrain_phase1", "data=pretrain_phase1_mix"]
SIZES = ["140m", "360m", "950m", "7b", "70b", "671b"]


def recipe(size: str, *more: str):
    return load_config([f"model=mobilellm_{size}", *PHASE1, *more])


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100_40"),
        ("NVIDIA A100-SXM4-80GB", "a100_80"),
        ("NVIDIA A100 80GB PCIe", "a100_80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_are_recognised(told, name):
    found = recognise(told)
    assert (found and found.name) == name


def test_every_hardware_is_plausible():
    for hardware in all_hardware():
        assert 100e12 < hardware.peak_flops < 1e16
        assert 32 * 2**30 < hardware.memory < 300 * 2**30


def test_a_plan_that_is_found_fits_and_its_arguments_make_the_same_run():
    config, hardware = recipe("7b", "distributed=fsdp2"), load_hardware("a100_80")
    asked, found = make_plan(config, hardware, 8), find(config, hardware, 8)
    assert not asked.fits  # 16 rows at once keep too many activations
    assert found.fits
    again = make_plan(recipe("7b", *overrides(found).split()), hardware, 8)
    assert again.memory == found.memory
    rows = []
    for plan in (asked, again):
        stage, degree = plan.config.training.stage, plan.config.distributed.tensor_parallel_degree
        rows.append(stage.batch_size_per_gpu * stage.gradient_accumulation_steps / degree)
    assert rows[0] == rows[1]
    assert find(recipe("70b"), hardware, 1) is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (["distributed.activation_checkpointing=full"], "activations"),
        (["training.stage.batch_size_per_gpu=8"], "activations"),
        (["distributed=fsdp2_tp"], "gathered"),
        (["distributed=fsdp2_tp"], "loss"),
    ],
)
def test_what_saves_memory_saves_it(changes, part):
    before = make_plan(recipe("950m", "distributed=fsdp2"), load_hardware("h100"), 4).memory
    after = make_plan(recipe("950m", "distributed=fsdp2", *changes), load_hardware("h100"), 4).memory
    assert getattr(after, part) < 0.9 * getattr(before, part)


def table_of(heading: str) -> list[list[str]]:
    """The rows of a table in ``docs/hardware.md``."""
    text = (REPOSITORY / "docs" / "hardware.md").read_text(encoding="utf-8")
    rows = text[text.index(f"| Model | {heading}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def hardware_of(cell: str) -> tuple[int, Hardware]:
    """Such as ``8 × A100 80GB``."""
    count, device = cell.split(" × ")
    return int(count), next(known for known in all_hardware() if set(known.device_name.split()) <= set(device.split()))


def smallest(fits) -> int | None:
    return next((devices for devices in (2**power for power in range(10)) if fits(devices)), None)


def test_the_documented_tables_are_what_is_planned(monkeypatch):
    monkeypatch.setattr("cheaper.planning.memory.FUSED_NORM", False)  # as in the PyTorch that they are made with
    for size, least, as_it_is, found in table_of("Specification, at least"):
        _, hardware = hardware_of(least)

        def plan(devices: int, size: str = size, hardware: Hardware = hardware):
            layout = "fsdp2" if devices > 1 else "single_gpu"
            return make_plan(recipe(size.lower(), f"distributed={layout}"), hardware, devices)

        devices = smallest(lambda devices: plan(devices).fits)
        assert as_it_is.split()[0] == str(devices or "none").lower(), (size, as_it_is)
        if memory := re.search(r"(\d+) GiB", as_it_is):
            assert round(plan(devices).memory.peak / 2**30) == int(memory[1])
        wanted = int(re.match(r"\d+", found)[0])
        assert find(recipe(size.lower()), hardware, wanted), size
        assert wanted == 1 or not find(recipe(size.lower()), hardware, wanted // 2), size
    for size, recommended, _, days in table_of("Specification, recommended"):
        devices, hardware = hardware_of(recommended)
        hours = find(recipe(size.lower()), hardware, devices).gpu_hours
        assert f"{hours / devices / 24:.0f} days" == days, size


def test_what_is_offloaded_takes_nothing_on_the_device():
    asked = ("distributed=fsdp2", "training.stage.batch_size_per_gpu=1", "distributed.activation_checkpointing=full")
    kept = make_plan(recipe("70b", *asked), load_hardware("h100"), 8).memory
    moved = make_plan(recipe("70b", *asked, "distributed.cpu_offload=true"), load_hardware("h100"), 8)
    assert moved.memory.offloaded == kept.parameters + kept.optimizer + kept.gradients
    assert moved.memory.peak == kept.gathered + kept.activations + kept.loss
    assert moved.fits
    assert f"{moved.memory.offloaded / 2**30:,.2f} GiB for each device" in table(moved)


def test_what_cannot_fit_is_an_error_before_anything_is_made(corpus, tmp_path, monkeypatch, capsys):
    run = corpus.arguments(tmp_path / "run")
    least = plan_memory(load_config(run), devices=1).least

    def on_a_device_with(memory: float, *more: str) -> tuple[int, str]:
        device = replace(load_hardware("h100"), memory_mib=memory / 2**20)
        monkeypatch.setattr("cheaper.planning.plan.this_device", lambda: device)
        return cli.main(["train", *run, *more]), capsys.readouterr().err

    status, line = on_a_device_with(0.99 * least)
    assert (status, "its state and gradients alone take" in line) == (2, True)
    assert on_a_device_with(3 * 2**30, "--dry-run")[0] == 0
    status, line = on_a_device_with(1.01 * least, "--dry-run")  # its activations have no place
    assert (status, "a step needs more memory than a device of this machine has" in line) == (2, True)
    assert not (tmp_path / "run").exists()


def test_time_and_cost(capsys):
    assert cli.main(["plan", "model=mobilellm_140m", "hardware=h100", "gpus=8", "mfu=0.5", "price=2"]) == 0
    told = capsys.readouterr().out
    plan = make_plan(recipe("140m", "distributed=fsdp2"), load_hardware("h100"), 8, mfu=0.5)
    assert plan.tokens_per_second == pytest.approx(0.5 * 989e12 / 1.0537e9, rel=0.01)  # 6 · N + 12 · L · H · E · T
    hours = 2e12 / plan.tokens_per_second / 3600
    assert f"{hours / 8 / 24:,.1f} days, {hours:,.0f} device-hours for 2T tokens" in told
    assert f"{hours * 2:,.0f} at 2 a device-hour" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hardware=h10"], "hardware=h10: no such hardware; did you mean h100"),
        (["gpus=many"], "gpus, mfu and price are numbers"),
        (["gpus=0"], "expected one device or more"),
        (["gpus=4", "distributed=fsdp2_tp", "distributed.tensor_parallel_degree=2"], "a divisor of model.num_heads=9"),
        (
            ["gpus=3", "distributed=fsdp2_tp", "model.num_heads=8", "model.num_kv_heads=2"],
            "gpus=3: expected a multiple",
        ),
        (["model=mobilellm_671b", "--find"], "nothing fits mobilellm_671b on 1 × h100"),
    ],
)
def test_mistakes(capsys, arguments, said):
    assert cli.main(["plan", "model=mobilellm_140m", *arguments]) == 2
    assert said in capsys.readouterr().err
