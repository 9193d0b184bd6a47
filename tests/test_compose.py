"""Recipes, groups, overrides, and what is said about mistakes in them."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from cheaper.compose import load_config, to_yaml, yaml_dir
from cheaper.config import parse_count, parse_warmup
from cheaper.errors import UserError
from cheaper.planning.hardware import load_hardware
from cheaper.planning.plan import make_plan

PHASE1 = ["model=mobilellm_140m", "training=pretrain_phase1", "data=pretrain_phase1_mix", "distributed=single_gpu"]


def test_groups_alone_make_the_run_of_the_specification():
    config = load_config(PHASE1)
    stage = config.training.stage
    assert (stage.learning_rate, stage.warmup, stage.final_lr_fraction) == (4e-3, "2000", 0.1)
    assert (stage.batch_size_per_gpu, stage.sequence_length, parse_count(stage.tokens)) == (16, 2048, 2 * 10**12)
    assert (stage.beta1, stage.beta2, stage.eps) == (0.9, 0.95, 1e-8)
    assert (stage.weight_decay, stage.max_grad_norm) == (0.1, 1.0)
    assert config.data.streams["fineweb_edu"].proportion == 63.75
    assert config.run_name == "mobilellm_140m-pretrain_phase1"
    assert config.training.checkpoint_dir == "runs/mobilellm_140m-pretrain_phase1"


def test_a_recipe_equals_its_groups():
    assert load_config([str(yaml_dir() / "pretrain_phase1.yaml")]) == load_config(PHASE1)


RECIPES = sorted([*yaml_dir().glob("*.yaml"), *yaml_dir().glob("quickstart/*.yaml")])


@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if path.name != "pipeline.yaml"], ids=lambda path: path.stem
)
def test_every_recipe_composes(recipe):
    config = load_config([str(recipe)])
    assert yaml.safe_load(to_yaml(config))["model"]["name"] == config.model.name


def test_recipes_start_from_the_folder_of_the_stage_before():
    stages = ("pretrain_phase1", "pretrain_phase2", "midtrain", "posttrain_general_sft", "posttrain_reasoning_sft")
    runs = [load_config([str(yaml_dir() / f"{stage}.yaml"), "model=mobilellm_950m"]).training for stage in stages]
    assert runs[0].checkpoint_path is None
    assert [Path(run.checkpoint_path) for run in runs[1:]] == [Path(run.checkpoint_dir) for run in runs[:-1]]


@pytest.mark.parametrize(
    ("stage", "data"),
    [
        ("pretrain_phase1", "pretrain_phase1_mix"),
        ("pretrain_phase2", "pretrain_phase2_mix"),
        ("midtrain", "pretrain_phase1_mix"),
        ("midtrain", "midtrain_mix"),
        ("midtrain", "midtrain_phase2_mix"),
        ("posttrain_general_sft", "general_sft"),
        ("posttrain_reasoning_sft", "reasoning_sft"),
    ],
)
def test_a_mixture_converted_without_naming_its_stage_fits_it(stage, data):
    converted = load_config(["model=mobilellm_140m", "training=pretrain_phase1", f"data={data}"]).data
    config = load_config(["model=mobilellm_950m", f"training={stage}", f"data={data}"])
    assert (converted.root, converted.row_length) == (config.data.root, config.data.row_length)
    whole = config.training.stage.sequence_length if data.endswith("sft") else config.data.row_length
    assert config.data.row_length == whole  # a chat is not cut


@pytest.mark.parametrize("phase", [1, 2])
def test_published_mixtures(phase):
    published = {  # per cent of tokens, phases 1 and 2
        "starcoder": (10.66, 0.52),
        "open_web_math": (6.93, 23.33),
        "fineweb_edu": (63.75, 54.83),
        "wikipedia": (5.03, 0.14),
        "arxiv": (6.36, 1.32),
        "stackexchange": (5.03, 0.86),
        "algebraic_stack": (2.25, 1.26),
        "nemotron_science": (None, 0.03),
        "nemotron_code": (None, 0.72),
        "nemotron_math": (None, 3.01),
        "cosmopedia": (None, 2.70),
        "natural_reasoning": (None, 3.18),
        "finemath": (None, 8.01),
        "pes2o": (None, 0.08),
    }
    config = load_config([str(yaml_dir() / f"pretrain_phase{phase}.yaml")])
    expected = {name: shares[phase - 1] for name, shares in published.items() if shares[phase - 1] is not None}
    assert {name: stream.proportion for name, stream in config.data.streams.items()} == expected


@pytest.mark.parametrize("phase", [1, 2])
def test_published_mixtures_of_mid_training(phase):
    published = {
        "dclm": (37.03, 6.51),
        "flan": (4.10, 0.72),
        "pes2o": (11.41, 2.01),
        "wiki": (2.66, 0.47),
        "stackexchange": (2.12, 2.00),
        "math": (11.63, 29.10),
        "nemotron_code": (20.69, 29.10),
        "nemotron_math": (3.45, 19.40),
        "starcoder": (6.90, 9.70),
    }
    data = "midtrain_mix" if phase == 1 else "midtrain_phase2_mix"
    streams = load_config(["model=mobilellm_950m", "training=midtrain", f"data={data}"]).data.streams
    for name, shares in published.items():
        assert streams[name].proportion == shares[phase - 1]
    benchmarks = [stream.proportion for name, stream in streams.items() if name not in published]
    assert len(benchmarks) == (0 if phase == 1 else 8)
    assert sum(benchmarks) == pytest.approx(0 if phase == 1 else 0.97)


@pytest.mark.parametrize("path", sorted((yaml_dir() / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_stream_has_one_source_without_a_script(path):
    scripted = ("togethercomputer/RedPajama-Data-1T", "EleutherAI/proof-pile-2", "allenai/peS2o", "ybisk/piqa")
    for stream in load_config(["model=tiny", "training=pretrain_phase1", f"data={path.stem}"]).data.streams.values():
        source = stream.source
        assert [source.path, source.listed_in, source.dataset].count(None) == 2
        assert source.dataset not in scripted


@pytest.mark.parametrize("path", sorted((yaml_dir() / "data").glob("*_mix.yaml")), ids=lambda path: path.stem)
def test_documents_of_text_do_not_end_like_a_turn(path):
    assert yaml.safe_load(path.read_text())["tokenizer"] == "meta-llama/Llama-3.1-8B"


def test_mixtures_take_whole_datasets():
    code = load_config([str(yaml_dir() / "posttrain_reasoning_sft.yaml")]).data.streams
    assert {code[name].source.split for name in ("code", "code_cpp")} == {"python", "cpp"}
    cosmopedia = load_config([str(yaml_dir() / "pretrain_phase2.yaml")]).data.streams["cosmopedia"].source
    folders = ["auto_math_text", "khanacademy", "openstax", "stanford", "stories", "web_samples_v1", "wikihow"]
    root = "hf://datasets/HuggingFaceTB/cosmopedia/data"
    assert all(fnmatch(f"{root}/{folder}/train-00000-of-00002.parquet", cosmopedia.path) for folder in folders)


def test_the_later_stages_have_the_values_of_the_specification():
    stages = {}
    for stage in ("midtrain", "posttrain_general_sft", "posttrain_reasoning_sft"):
        training = stages[stage] = load_config([str(yaml_dir() / f"{stage}.yaml")]).training
        assert (training.stage.beta1, training.stage.beta2, training.stage.final_lr_fraction) == (0.9, 0.95, 0)
    middle, general, reasoning = stages.values()
    assert (middle.stage.tokens, middle.stage.learning_rate, middle.stage.warmup) == ("100B", 3.6e-4, "0")
    assert (middle.stage.batch_size_per_gpu, middle.stage.sequence_length, middle.stage.weight_decay) == (4, 4096, 0.1)
    assert (middle.distillation.kd_alpha, middle.distillation.temperature) == (1.0, 1.0)
    assert middle.targets == ["train/kd_loss < 2.0", "train/teacher_agreement > 0.60", "train/accuracy > 0.45"]
    assert (general.stage.epochs, general.stage.learning_rate, general.stage.warmup) == (2, 5e-6, "3%")
    assert (general.stage.batch_size_per_gpu, general.stage.sequence_length, general.stage.weight_decay) == (4, 4096, 0)
    assert (reasoning.stage.epochs, reasoning.stage.learning_rate, reasoning.stage.warmup) == (3, 1e-5, "10%")
    assert reasoning.stage.batch_size_per_gpu * reasoning.stage.gradient_accumulation_steps == 8
    assert reasoning.stage.sequence_length == 32768
    assert reasoning.long_context.enabled
    assert (reasoning.long_context.rope_theta_factor, reasoning.long_context.max_position_embeddings) == (8, 32768)


@pytest.mark.parametrize(
    ("stage", "data"),
    [
        ("midtrain", "midtrain_mix"),
        ("posttrain_general_sft", "general_sft"),
        ("posttrain_reasoning_sft", "reasoning_sft"),
    ],
)
def test_the_later_stages_fit_the_hardware_of_the_specification(stage, data):
    config = load_config(["model=mobilellm_950m", f"training={stage}", f"data={data}", "distributed=fsdp2"])
    assert make_plan(config, load_hardware("a100_80"), 4, 0.4).fits


def test_overrides_of_the_specification():
    config = load_config(
        [
            *PHASE1,
            "training.stage.learning_rate=1e-4",
            "training.stage.batch_size_per_gpu=8",
            "training.stage.gradient_accumulation_steps=4",
            "training.stage.max_grad_norm=1.0",
            "training.checkpoint_path=/path/to/checkpoint",
            "training.resume=true",
            "model.use_flash_attention=true",
            "logging.wandb.enabled=true",
            "logging.wandb.project=cheapertraining",
            "logging.wandb.run_name=mobilellm_950m_phase1",
        ]
    )
    assert config.training.stage.learning_rate == 1e-4
    assert config.training.stage.gradient_accumulation_steps == 4
    assert config.training.resume is True
    assert config.logging.wandb.run_name == "mobilellm_950m_phase1"
    config = load_config([*PHASE1[1:], "model=mobilellm_360m", "model.num_layers=24", "model.num_heads=16"])
    assert (config.model.num_layers, config.model.num_heads) == (24, 16)


def test_a_recipe_of_ones_own_finds_the_groups(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "name: mine\ntokenizer: here\nstreams: {a: {proportion: 1, source: {path: a.jsonl}}}\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "defaults: [{model: tiny}, {training: pretrain_phase1}, {data: mine}, {distributed: single_gpu},"
        " {logging: console}, _self_]\nrun_name: mine\n"
    )
    config = load_config([str(recipe), "model=mobilellm_360m", "data.streams.b.proportion=2"])
    assert (config.run_name, config.model.name, config.data.name) == ("mine", "mobilellm_360m", "mine")
    assert config.data.streams["a"].source.path == "a.jsonl"
    assert config.data.streams["b"].proportion == 2


def test_the_written_run_says_the_same_again(tmp_path):
    config = load_config(PHASE1)
    tree = yaml.safe_load(to_yaml(config))
    assert tree["training"]["stage"]["learning_rate"] == 0.004
    assert "${" not in to_yaml(config)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "training.stage.learning_rat=1",
            "training.stage.learning_rat is not a key; did you mean learning_rate? (the command line)",
        ),
        ("model.num_layers=many", "model.num_layers is 'many': Value 'many' of type 'str' could not be converted"),
        ("data.streams.wikipedia.proportion=-0.2", "proportion is -0.2: expected a number ≥ 0 (the command line)"),
        ("training.stage.tokens=5X", "training.stage.tokens is 5X: expected a count of tokens such as 2T"),
        ("training.stage.warmup=120%", "training.stage.warmup is 120%: expected steps such as 2000"),
        (
            "model.num_heads=16",
            "model.num_heads is 16: expected a multiple of model.num_kv_heads=3; add model.num_kv_heads=4, or one of",
        ),
        ("training.stage.sequence_length=8192", "expected at most model.max_position_embeddings=4096"),
        ("training.precision=fp8", "training.precision is fp8: expected one of bf16, fp32"),
        ("model=mobilellm_140", "no such model; did you mean mobilellm_140m?"),
        ("data.streams=3", "data.streams is 3: expected a section of names"),
        ("data.streams.wikipedia=3", "data.streams.wikipedia is 3: expected a section with proportion"),
        ("run_name=${nothing}", "run_name does not resolve"),
        ("training", "argument training: expected key=value"),
        ("training.seed=[", "argument training.seed=[: the value is not valid YAML"),
    ],
)
def test_a_mistake_is_told_in_one_line(argument, message):
    with pytest.raises(UserError) as error:
        load_config([*PHASE1, argument])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_unknown_keys_are_told_at_once():
    with pytest.raises(UserError) as error:
        load_config([*PHASE1, "model.num_layer=3", "training.sed=1", "nothing=1"])
    assert len(str(error.value).splitlines()) == 3


def test_a_mixture_of_zeros_is_refused():
    zeros = [f"data.streams.{name}.proportion=0" for name in load_config(PHASE1).data.streams]
    with pytest.raises(UserError, match=r"data.streams has only proportions of 0"):
        load_config([*PHASE1, *zeros])


def test_a_missing_group_names_the_choices():
    with pytest.raises(UserError, match=r"no training is chosen: add training=…, one of midtrain, "):
        load_config(["model=tiny", "data=sample"])


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("defaults: [{model: tiny}]\ndata: {bogus: 1}\n")
    with pytest.raises(UserError, match=r"no training is chosen"):
        load_config([str(recipe)])
    recipe.write_text("model: [unclosed\n")
    with pytest.raises(UserError, match=r"recipe.yaml"):
        load_config([str(recipe)])
    with pytest.raises(UserError, match=r"no such file; did you mean pretrain_phase1.yaml"):
        load_config([str(Path("yamls") / "pretrain_phase_1.yaml")])


@pytest.mark.parametrize(
    ("text", "count"), [("2T", 2 * 10**12), ("100B", 10**11), ("5M", 5 * 10**6), ("1.5m", 1_500_000), ("4096", 4096)]
)
def test_parse_count(text, count):
    assert parse_count(text) == count


def test_parse_warmup():
    assert parse_warmup("2000") == (2000, "steps")
    assert parse_warmup("3%") == (0.03, "share")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.experts.per_tokn=4", "model.experts.per_tokn is not a key; did you mean per_token?"),
        ("model.experts.groups=7", "model.experts.groups is 7: expected a divisor of number=256"),
        ("model.experts.groups_kept=9", "model.experts.groups_kept is 9: expected at most 8"),
        ("model.experts.per_token=200", "model.experts.per_token is 200: expected at most the 128 experts"),
        ("model.latent_attention.query_rank=0", "model.latent_attention.query_rank is 0: expected a number ≥ 1"),
        ("model.latent_attention=3", "model.latent_attention is 3: expected a section with query_rank"),
    ],
)
def test_sections_that_may_be_left_out_are_checked_where_they_are_there(override, message):
    choices = ["model=mobilellm_671b", "training=pretrain_phase1", "data=pretrain_phase1_mix"]
    with pytest.raises(UserError, match=re.escape(message)):
        load_config([*choices, override])
