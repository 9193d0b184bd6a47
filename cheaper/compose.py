"""How YAML and the command line become a run.

A run is a recipe (``yamls/<recipe>.yaml``) or five group choices (``model=… training=… data=… distributed=…
logging=…``), composed by Hydra, then ``key.path=value`` overrides, all checked against ``cheaper.config``.
Nothing else in the package reads the run's YAML.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cheaper.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, parse_count, parse_target, parse_warmup
from cheaper.errors import UserError, did_you_mean

GROUPS = ("model", "training", "data", "distributed", "logging")
DEFAULT_CHOICES = {"distributed": "single_gpu", "logging": "console"}
Problem = tuple[str, str]  # (dotted key, what is wrong with it)


def yaml_dir() -> Path:
    """Folder of the recipes and groups: inside the installed package, or at the top of a checkout."""
    packaged = Path(__file__).parent / "yamls"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "yamls"


def load_config(args: Sequence[str], defaults: Mapping[str, str] = DEFAULT_CHOICES) -> RunConfig:
    """Composes a run from ``[recipe.yaml] [group=choice …] [key.path=value …]`` and checks it.

    Args:
        args: As on the command line.
        defaults: The choices of groups that are not named, where there is no recipe.

    Raises:
        UserError: One line per mistake, each naming the key, its value, where it was written and what was expected.
    """
    recipe, choices, overrides = _split(args)
    tree, files = _compose(recipe, choices if recipe else {**defaults, **choices})
    origins: dict[str, str] = {}
    for key, value in overrides:
        _assign(tree, key, value)
        origins[key] = "the command line"

    def origin(key: str) -> str:
        given = [name for name in origins if key == name or key.startswith(name + ".")]
        return origins[given[0]] if given else files.get(key.split(".")[0], files["run"])

    _raise_all(_unknown_keys(tree, RunConfig), origin)
    config, errors = _typed(tree)
    _raise_all(errors, origin)
    _raise_all(_out_of_range(config), origin)
    _raise_all(_impossible(config), origin)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved run as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ``(dotted key, value)`` for every leaf of a nested dict."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _raise_all(problems: list[Problem], origin: typing.Callable[[str], str]) -> None:
    if problems:
        raise UserError("\n".join(f"{key} {text} ({origin(key)})" for key, text in problems))


def _split(args: Sequence[str]) -> tuple[Path | None, dict[str, str], list[tuple[str, Any]]]:
    recipe, choices, overrides = None, {}, []
    for position, arg in enumerate(args):
        key, equals, value = arg.partition("=")
        if not equals:
            if position or not arg.endswith((".yaml", ".yml")):
                raise UserError(f"argument {arg}: expected key=value, or first a recipe (.yaml)")
            recipe = Path(arg)
            if not recipe.is_file():
                known = {path.name for base in (recipe.parent, yaml_dir()) for path in base.glob("*.yaml")}
                raise UserError(f"recipe {arg}: no such file{did_you_mean(recipe.name, known)}")
        elif key in GROUPS:
            choices[key] = value
        else:
            try:
                overrides.append((key, yaml.safe_load(value)))
            except yaml.YAMLError:
                raise UserError(f"argument {arg}: the value is not valid YAML") from None
    return recipe, choices, overrides


def _compose(recipe: Path | None, choices: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the composed tree, and for each group (and ``"run"``) the file its values come from."""
    written_in = str(recipe) if recipe else "the command line"
    folder = recipe.parent.resolve() if recipe else yaml_dir()
    picked = _hydra(folder, recipe, [])[1] if recipe else {}
    files = {"run": written_in}
    for group, choice in {**picked, **choices}.items():
        candidates = [base / group / f"{choice}.yaml" for base in (folder, yaml_dir())]
        existing = [path for path in candidates if path.is_file()]
        if not existing:
            known = {path.stem for base in (folder, yaml_dir()) for path in (base / group).glob("*.yaml")}
            raise UserError(f"{group}={choice} (the command line): no such {group}{did_you_mean(choice, known)}")
        files[group] = _shown(existing[0])
    missing = [group for group in GROUPS if group not in files]
    if missing:
        known = sorted(path.stem for path in (yaml_dir() / missing[0]).glob("*.yaml"))
        raise UserError(f"no {missing[0]} is chosen: add {missing[0]}=…, one of {', '.join(known)}")
    selection = [f"{'' if group in picked else '+'}{group}={choice}" for group, choice in choices.items()]
    return _hydra(folder, recipe, selection)[0], files


def _hydra(folder: Path, recipe: Path | None, selection: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Composes with Hydra; returns the tree and the choice made in each group."""
    if folder != yaml_dir():
        selection = [*selection, f"hydra.searchpath=[file://{yaml_dir()}]"]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base=None, config_dir=str(folder)):
            composed = hydra.compose(recipe.stem if recipe else None, selection, return_hydra_config=True)
        made = {group: choice for group, choice in composed.hydra.runtime.choices.items() if group in GROUPS}
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        return OmegaConf.to_container(composed), made
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{recipe or 'the command line'}: {' '.join(str(error).split())}") from None


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = value


def _unknown_keys(tree: Any, schema: Any, path: str = "") -> list[Problem]:
    if typing.get_origin(schema) is dict:
        element = typing.get_args(schema)[1]
        if not isinstance(tree, dict):
            return [(path, f"is {tree!r}: expected a section of names, each with {', '.join(_types(element))}")]
        return [p for key, value in tree.items() for p in _unknown_keys(value, element, f"{path}.{key}")]
    if section := _optional_section(schema):
        return [] if tree is None else _unknown_keys(tree, section, path)
    if not dataclasses.is_dataclass(schema):
        return []
    if not isinstance(tree, dict):
        return [(path, f"is {tree!r}: expected a section with {', '.join(_types(schema))}")]
    problems: list[Problem] = []
    for key, value in tree.items():
        full = f"{path}.{key}" if path else str(key)
        if key in _types(schema):
            problems += _unknown_keys(value, _types(schema)[key], full)
        else:
            problems.append((full, f"is not a key{did_you_mean(str(key), _types(schema))}"))
    return problems


def _sections_that_may_be_missing(tree: Any, schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the key and class of every section that is there: one that the YAML names freely, or may leave out."""
    for key, expected in _types(schema).items() if isinstance(tree, dict) else ():
        full = f"{path}.{key}" if path else key
        if dataclasses.is_dataclass(expected):
            yield from _sections_that_may_be_missing(tree.get(key), expected, full)
        elif (section := _optional_section(expected)) and isinstance(tree.get(key), dict):
            yield full, section
        elif typing.get_origin(expected) is dict:
            yield from ((f"{full}.{name}", typing.get_args(expected)[1]) for name in tree.get(key) or ())


def _optional_section(hint: Any) -> Any:
    """The class of a section that may be left out; ``None`` for any other type."""
    choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
    optional = type(None) in typing.get_args(hint) and len(choices) == 1
    return choices[0] if optional and dataclasses.is_dataclass(choices[0]) else None


def _types(schema: Any) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _typed(tree: dict[str, Any]) -> tuple[RunConfig, list[Problem]]:
    config = OmegaConf.structured(RunConfig)
    for key, schema in _sections_that_may_be_missing(tree, RunConfig):
        OmegaConf.update(config, key, schema())
    problems: list[Problem] = []
    for key, value in leaves(tree):
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            problems.append((key, f"is {value!r}: {str(error).splitlines()[0]}"))
    if problems:
        return None, problems  # type: ignore[return-value]
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            return None, [(key, "has no value: it must be given") for key in missing]  # type: ignore[return-value]
        OmegaConf.resolve(config)
        return OmegaConf.to_object(config), []
    except OmegaConfBaseException as error:
        return None, [(error.full_key or "run_name", f"does not resolve: {str(error).splitlines()[0]}")]  # type: ignore


def _out_of_range(config: Any, path: str = "") -> list[Problem]:
    problems: list[Problem] = []
    if isinstance(config, dict):
        for key, value in config.items():
            problems += _out_of_range(value, f"{path}.{key}")
    elif dataclasses.is_dataclass(config):
        for spec in dataclasses.fields(config):
            value, key = getattr(config, spec.name), f"{path}.{spec.name}" if path else spec.name
            problems += _out_of_range(value, key)
            if value is None:
                continue
            if "min" in spec.metadata and not value >= spec.metadata["min"]:
                problems.append((key, f"is {value}: expected a number ≥ {spec.metadata['min']}"))
            if "above" in spec.metadata and not value > spec.metadata["above"]:
                problems.append((key, f"is {value}: expected a number > {spec.metadata['above']}"))
            if "max" in spec.metadata and not value <= spec.metadata["max"]:
                problems.append((key, f"is {value}: expected a number ≤ {spec.metadata['max']}"))
            if "below" in spec.metadata and not value < spec.metadata["below"]:
                problems.append((key, f"is {value}: expected a number < {spec.metadata['below']}"))
            if "choices" in spec.metadata and value not in spec.metadata["choices"]:
                problems.append((key, f"is {value}: expected one of {', '.join(spec.metadata['choices'])}"))
    return problems


def _impossible(config: RunConfig) -> list[Problem]:
    """Combinations that no value on its own gives away."""
    model, stage, data = config.model, config.training.stage, config.data
    problems: list[Problem] = []
    if (stage.tokens is None) == (stage.epochs is None):
        problems.append(("training.stage", f"has tokens={stage.tokens}, epochs={stage.epochs}: expected one of them"))
    for key, parse, value in (
        ("training.stage.tokens", parse_count, stage.tokens),
        ("training.stage.warmup", parse_warmup, stage.warmup),
        ("training.benchmarks.every", parse_count, config.training.benchmarks.every),
        *(("training.targets", parse_target, target) for target in config.training.targets),
    ):
        try:
            if value is None:
                continue
            parse(value)
        except ValueError as error:
            problems.append((key, f"is {value}: {error}"))
    if model.num_heads % model.num_kv_heads:
        fitting = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        nearest = min(fitting, key=lambda n: (abs(n - model.num_kv_heads), -n))
        text = f"is {model.num_heads}: expected a multiple of model.num_kv_heads={model.num_kv_heads}"
        problems.append(("model.num_heads", f"{text}; add model.num_kv_heads={nearest}, or one of {fitting}"))
    if model.head_dim % 2:
        problems.append(("model.head_dim", f"is {model.head_dim}: expected an even number (rotary positions)"))
    problems += _impossible_experts(model)
    long = config.training.long_context
    key, limit = "model", model.max_position_embeddings
    if long.enabled:
        key, limit = "training.long_context", long.max_position_embeddings
    if stage.sequence_length > limit:
        expected = f"expected at most {key}.max_position_embeddings={limit}"
        problems.append(("training.stage.sequence_length", f"is {stage.sequence_length}: {expected}"))
    if data.row_length % stage.sequence_length:
        text = f"is {data.row_length}: expected a multiple of training.stage.sequence_length={stage.sequence_length}"
        problems.append(("data.row_length", text))
    problems += _impossible_distillation(config.training)
    for key in ("replicate_degree", "tensor_parallel_degree", "cpu_offload"):
        value = getattr(config.distributed, key)
        if value > 1 - isinstance(value, bool) and not config.distributed.shard:
            problems.append(
                (f"distributed.{key}", f"is {value}: expected distributed.shard=true, as distributed=fsdp2")
            )
    return problems + _impossible_streams(data)


def _impossible_experts(model: ModelConfig) -> list[Problem]:
    if (experts := model.experts) is None:
        return []
    problems = []
    if experts.number % experts.groups or experts.number < 2 * experts.groups:
        text = f"is {experts.groups}: expected a divisor of number={experts.number} with two experts or more in each"
        problems.append(("model.experts.groups", text))
    if experts.groups_kept > experts.groups:
        problems.append(("model.experts.groups_kept", f"is {experts.groups_kept}: expected at most {experts.groups}"))
    available = experts.groups_kept * experts.number // experts.groups
    if experts.per_token > available:
        text = f"is {experts.per_token}: expected at most the {available} experts of the groups kept"
        problems.append(("model.experts.per_token", text))
    return problems


def _impossible_streams(data: DataConfig) -> list[Problem]:
    if not data.streams:
        return [("data.streams", "is empty: expected at least one stream")]
    problems = []
    without = [name for name, stream in data.streams.items() if stream.proportion is None]
    if without and len(without) < len(data.streams):
        problems.append((f"data.streams.{without[0]}", "has no proportion, others have: expected all of them or none"))
    elif not without and not any(stream.proportion for stream in data.streams.values()):
        problems.append(("data.streams", "has only proportions of 0: expected at least one above 0"))
    for name in data.held_out.keys() & data.streams.keys():
        problems.append((f"data.held_out.{name}", "is a name of data.streams too: expected another"))
    return problems


def _impossible_distillation(training: TrainingConfig) -> list[Problem]:
    settings, problems = training.distillation, []
    if settings.top_k is not None and settings.top_k < 1:
        problems.append(("training.distillation.top_k", f"is {settings.top_k}: expected at least one word"))
    if settings.divergence != "forward_kl" and (training.teacher_cache or settings.top_k):
        what = "training.teacher_cache" if training.teacher_cache else "training.distillation.top_k"
        text = f"is {settings.divergence}: {what} keeps some of the teacher's words, expected forward_kl"
        problems.append(("training.distillation.divergence", text))
    return problems
