"""``training.checkpoint_dir``: one folder per run, which no other run may write into.

It holds ``run.yaml`` (the resolved configuration), ``step-<n>.pt`` or ``step-<n>/`` (checkpoints), ``metrics.jsonl``,
``samples.jsonl`` and ``summary.json``.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import OmegaConf

from cheaper.checkpoints import is_checkpoint
from cheaper.compose import leaves, to_yaml
from cheaper.config import RunConfig
from cheaper.errors import UserError
from cheaper.files import newest_checkpoint, write_atomically


def open_run_folder(config: RunConfig) -> Path | None:
    """Makes ``training.checkpoint_dir`` ready and finds the checkpoint to go on from.

    Returns:
        The checkpoint to resume from; ``None`` for a run that starts at step 0.

    Raises:
        UserError: The folder holds another run, or there is nothing to resume from.
    """
    training = config.training
    folder = Path(training.checkpoint_dir)
    newest = newest_checkpoint(folder)
    if newest and not training.resume:
        raise UserError(
            f"training.checkpoint_dir {folder} already holds a run ({newest.name}): "
            "add training.resume=true to go on with it, or choose another folder"
        )
    resume_from = _resume_point(config, newest) if training.resume else None
    if resume_from:
        _check_same_run(config, resume_from.parent / "run.yaml")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"training.checkpoint_dir {folder}: {error.strerror}") from None
    return resume_from


def _resume_point(config: RunConfig, newest: Path | None) -> Path:
    """The newest checkpoint of the run's own folder, else the one at ``training.checkpoint_path``.

    The folder comes first so that a run which started from another's weights resumes by the same command.
    """
    training = config.training
    if newest:
        _check_newest(training.checkpoint_path, newest)
        return newest
    if not training.checkpoint_path:
        raise UserError(
            f"training.resume=true: no checkpoint in training.checkpoint_dir {training.checkpoint_dir}; "
            "leave it out to start from the beginning"
        )
    given = Path(training.checkpoint_path)
    found = given if is_checkpoint(given) else newest_checkpoint(given)
    if not found:
        raise UserError(f"training.checkpoint_path {given}: there is no checkpoint to resume from")
    return found


def _check_newest(named: str | None, newest: Path) -> None:
    """Refuses to go on from ``newest`` where an earlier checkpoint of its run is asked for."""
    given = Path(named or newest).resolve()
    if given.parent == newest.parent.resolve() and given != newest.resolve():
        raise UserError(
            f"training.checkpoint_path {named}: {newest.parent} holds later checkpoints, up to {newest.name}; "
            "to go back, choose another training.checkpoint_dir, or remove them"
        )


# Keys that may differ between a run and its continuation: they do not change what is computed.
FREE = ("run_name", "logging", "distributed", "data.root", "data.cache", "data.num_workers", "training.resume")
FREE += ("training.checkpoint_path", "training.expects_weights", "training.checkpoint_dir")
FREE += ("training.checkpoint_interval", "training.samples")
FREE += ("training.stage.batch_size_per_gpu", "training.stage.gradient_accumulation_steps")  # see check_same_steps
FREE += ("training.keep_checkpoints", "training.expected", "model.use_flash_attention", "data.trust_remote_code")
FREE += ("training.compile", "training.profile", "training.benchmarks", "training.eval_interval", "training.targets")


def _check_same_run(config: RunConfig, saved: Path) -> None:
    if not saved.is_file():
        return  # a checkpoint that was moved alone; its shapes are still checked
    run = yaml.safe_load(saved.read_text())
    if "training" not in run:
        raise UserError(f"{saved.parent} holds weights alone; start from it, without training.resume=true")
    now = dict(leaves(yaml.safe_load(to_yaml(config))))
    defaults = dict(leaves(OmegaConf.to_container(OmegaConf.structured(RunConfig))))
    # A key that is newer than the run had its default's effect.
    before = {key: now[key] for key in now if "${" in str(defaults.get(key)) or now[key] == defaults.get(key)}
    before |= dict(leaves(run))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(FREE):
            raise UserError(
                f"{key} is {now.get(key)}: the run to resume was started with {before.get(key)} ({saved}); "
                "resume with the same value, or start another run from its weights"
            )


def write_run_yaml(config: RunConfig) -> None:
    """Keeps the resolved configuration beside the checkpoints."""
    path = Path(config.training.checkpoint_dir) / "run.yaml"
    write_atomically(path, to_yaml(config).encode())
