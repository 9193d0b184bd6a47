"""``cheaper <verb>``: the commands. Each verb calls one function of the package."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cheaper import cli_models
from cheaper.arguments import ArgumentParser
from cheaper.compose import DEFAULT_CHOICES, load_config, to_yaml, yaml_dir
from cheaper.config import RunConfig
from cheaper.distributed.slurm import adopt_slurm
from cheaper.errors import UserError, did_you_mean

USAGE = """usage: cheaper train   [recipe.yaml] [group=choice …] [key=value …] [--dry-run]
       cheaper pipeline [pipeline.yaml] [key=value …] [--from STAGE] [--until STAGE] [--launcher COMMAND] [--dry-run]
       cheaper plan    [recipe.yaml] [group=choice …] [key=value …] hardware=h100 gpus=64 [mfu=0.4] [price=2.5] [--find]
       cheaper convert [recipe.yaml] [data=…] [key=value …] [--processes N] [--only STREAM …] [--engine processes|ray]
       cheaper cache-teacher [recipe.yaml] training.teacher_model=… training.teacher_cache=FOLDER [key=value …]
                       [--k 50] [--kind sampled|top_k] [--precision compact|fp32] [--only STREAM …]
       cheaper report  RUN … [--output report.html] [--png]
       cheaper submit  STAGE --to mcli|slurm|sky [--nodes N] [--gpus 8] [--gpu h100] [--storage FOLDER] [--dry-run]
                       [--pipeline pipeline.yaml] [--hours 24] [--cluster NAME] [key=value …]
       cheaper generate MODEL PROMPT | --file PROMPTS [--chat] [--max_new_tokens 256] [--temperature 0] [--top_p 1]
                       [--stop TEXT …] [--seed 0] [--output FILE] [--batch_size 16] [--tokenizer TOKENIZER]
       cheaper chat    MODEL [--system TEXT] [--max_new_tokens 256] [--temperature 0] [--top_p 1] [--stop TEXT …]
       cheaper evaluate --model_path MODEL [--benchmarks base|final|NAME,…] [--data_dir FOLDER] [--limit N]
                       [--batch_size 16] [--max_new_tokens N] [--samples N] [--seed 1234] [--execute_code]
                       [--tokenizer TOKENIZER] [--output evaluation.json]
       cheaper export  MODEL --to hf|gguf --output NEW [--dtype fp32|bf16|fp16] [--tokenizer TOKENIZER]
       cheaper import  MODEL --output NEW [--tokenizer TOKENIZER]
       cheaper consolidate RUN [--output FILE.pt]
       cheaper inspect FOLDER --tokenizer TOKENIZER [--first N] [--rows N]
       cheaper sample"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0 done, 2 the user's mistake, 130 or 143 stopped by a signal."""
    verb, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    verbs = {
        "train": train,
        "pipeline": pipeline,
        "plan": plan,
        "convert": convert,
        "cache-teacher": cache_teacher,
        "submit": submit,
        "report": report,
        "generate": cli_models.generate,
        "chat": cli_models.chat,
        "evaluate": cli_models.evaluate,
        "export": cli_models.export,
        "import": cli_models.import_,
        "consolidate": consolidate,
        "inspect": inspect,
        "sample": sample,
    }
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if verb not in verbs:
            raise UserError(f"cheaper {verb}: no such verb{did_you_mean(verb, verbs)}")
        if verb in ("train", "cache-teacher", "evaluate"):
            adopt_slurm(os.environ)
        return verbs[verb](rest)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every process meets the same mistake; one says so
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2


def train(args: list[str]) -> int:
    """Trains; ``--dry-run`` resolves and checks the run, prints it and stops."""
    dry_run = "--dry-run" in args
    config = load_config([arg for arg in args if arg != "--dry-run"])
    check_start(config)
    from cheaper import training  # PyTorch and Composer take seconds to import; a misspelt key is told at once
    from cheaper.callbacks.checkpointer import Stopped
    from cheaper.distributed.processes import lost_another
    from cheaper.planning.plan import check_memory, table

    if dry_run:
        print(to_yaml(config))
        plan = check_memory(config)
        print(table(plan))
        with _conversion_told(args):
            training.check_data(config)
        if not plan.fits:
            raise UserError("a step needs more memory than a device of this machine has; try: cheaper plan --find")
        print("the run is sound: its shards, its tokenizer and its memory fit")
        return 0
    with _conversion_told(args):
        trainer = training.build_trainer(config)
    status, lost = 0, None
    try:
        if trainer.state.timestamp >= trainer.state.max_duration:
            print(f"{config.run_name} has finished: {config.training.checkpoint_dir}")
        else:
            trainer.fit()
    except Stopped as stop:
        print(f"{stop}; add training.resume=true to the same command to go on", file=sys.stderr)
        status = 128 + stop.signum
    except RuntimeError as error:
        if not (lost := lost_another(error)):
            raise
        print(f"\nerror: {lost}; add training.resume=true to the same command to go on", file=sys.stderr)
        status = 1
    finally:
        if not lost:  # the others would have to take part
            trainer.close()
    return status


def check_start(config: RunConfig) -> None:
    """Warns of a later stage that starts from random weights.

    Raises:
        UserError: The weights to start from should be on this machine and are not.
    """
    training, start = config.training, config.training.checkpoint_path
    if training.resume:
        return
    if start and start.startswith((".", "/")) and not Path(start).exists():
        what = "no such file or folder; train the stage before, or name other weights"
        raise UserError(f"training.checkpoint_path {start}: {what}")
    if not start and training.expects_weights and os.environ.get("RANK", "0") == "0":
        print(f"warning: {training.name} starts from random weights: training.checkpoint_path is none", file=sys.stderr)


@contextlib.contextmanager
def _conversion_told(args: list[str]) -> Iterator[None]:
    """Where shards are missing, says the whole command that makes those which ``args`` train on."""
    from cheaper.data.streams import MissingShardsError

    try:
        yield
    except MissingShardsError as error:
        kept = ("data=", "data.", "training=", "training.stage.sequence_length=")
        arguments = [arg for arg in args if arg.startswith(kept) or arg.endswith((".yaml", ".yml"))]
        raise UserError(f"{error} {shlex.join(arguments)}") from None


def pipeline(args: list[str]) -> int:
    """Trains the stages of a pipeline one after the other; those that have finished are not run again."""
    parser = ArgumentParser(prog="cheaper pipeline")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="begin here")
    parser.add_argument("--until", metavar="STAGE", help="end here")
    parser.add_argument("--launcher", help='such as "torchrun --nproc_per_node=8"; by default all GPUs of this machine')
    parser.add_argument("--dry-run", action="store_true", help="only print the commands and the states")
    options, rest = parser.parse_known_args(args)
    from cheaper.pipeline import command, default_launcher, load_pipeline, run_pipeline, selected, table

    path = Path(rest.pop(0)) if rest and rest[0].endswith((".yaml", ".yml")) else yaml_dir() / "pipeline.yaml"
    stages = load_pipeline(path, rest)
    launcher = options.launcher or default_launcher()
    status = 0
    if options.dry_run:
        by_name = {stage.name: stage for stage in stages}
        for stage in selected(stages, options.first, options.until):
            print("$ " + shlex.join(command(stage, by_name.get(stage.start_from), launcher)))
    else:
        status = run_pipeline(stages, launcher, options.first, options.until)
    print("\n" + table(stages))
    return status


def plan(args: list[str]) -> int:
    """Says what a run will take: memory on each device, time and money; ``--find`` looks for settings that fit."""
    own = {"hardware": "h100", "gpus": "1", "mfu": "0.4", "price": None}
    own |= dict(arg.split("=", 1) for arg in args if arg.partition("=")[0] in own)
    rest = [arg for arg in args if arg.partition("=")[0] not in own and arg != "--find"]
    try:
        devices, mfu, price = int(own["gpus"]), float(own["mfu"]), float(own["price"]) if own["price"] else None
    except ValueError as error:
        raise UserError(f"gpus, mfu and price are numbers ({error})") from None
    if devices < 1 or not 0 < mfu <= 1:
        raise UserError(f"gpus={devices} mfu={mfu}: expected one device or more, and a share of the peak up to 1")
    layout = "fsdp2" if devices > 1 else "single_gpu"
    defaults = {**DEFAULT_CHOICES, "training": "pretrain_phase1", "data": "pretrain_phase1_mix", "distributed": layout}
    config = load_config(rest, defaults)
    from cheaper.planning import plan as planning
    from cheaper.planning.hardware import load_hardware

    hardware = load_hardware(own["hardware"])
    made = planning.make_plan(config, hardware, devices, mfu)
    if "--find" in args:
        found = planning.find(config, hardware, devices, mfu)
        if found is None:
            print(planning.table(made, price))
            raise UserError(f"nothing fits {config.model.name} on {devices} × {hardware.name}; try more devices")
        print(planning.overrides(found) + "\n")
        made = found
    print(planning.table(made, price))
    return 0


def submit(args: list[str]) -> int:
    """Hands a stage to a cluster; ``--dry-run`` only prints the job."""
    from cheaper.pipeline import load_pipeline, selected
    from cheaper.submit import TARGETS, Job
    from cheaper.submit import submit as hand_over

    defaults = Job("")
    parser = ArgumentParser(prog="cheaper submit")
    parser.add_argument("stage", help="of the pipeline")
    parser.add_argument("--to", choices=TARGETS, required=True)
    parser.add_argument("--nodes", type=int, default=defaults.nodes, help="machines")
    parser.add_argument("--gpus", type=int, default=defaults.gpus, help="of each machine")
    parser.add_argument("--gpu", default=defaults.gpu, help="their kind, as the cluster calls it")
    parser.add_argument("--pipeline", default=defaults.pipeline)
    parser.add_argument("--storage", default=defaults.storage, help="a folder that all machines and attempts see")
    parser.add_argument("--hours", type=int, default=defaults.hours, help="the longest an attempt takes (slurm)")
    parser.add_argument("--cluster", default=defaults.cluster, help="its name (mcli)")
    parser.add_argument("--dry-run", action="store_true")
    options, overrides = parser.parse_known_args(args)
    selected(load_pipeline(Path(options.pipeline), overrides), options.stage, options.stage)
    target, dry_run = options.to, options.dry_run
    job = Job(overrides=overrides, **{k: v for k, v in vars(options).items() if k not in ("to", "dry_run")})
    if dry_run:
        print(TARGETS[target][0](job), end="")
    else:
        print(hand_over(job, target, Path()))
    return 0


def convert(args: list[str]) -> int:
    """Turns the raw rows of a mixture into MDS shards; needs only ``data=…``."""
    parser = ArgumentParser(prog="cheaper convert")
    parser.add_argument("--processes", type=int, help="worker processes; all cores by default")
    parser.add_argument("--only", nargs="+", metavar="STREAM", help="convert these streams of the mixture alone")
    parser.add_argument("--engine", choices=["processes", "ray"], default="processes", help="one machine, or a cluster")
    options, rest = parser.parse_known_args(args)
    # Rows have the sequence length of the stage; without one named, that of pre-training.
    config = load_config(rest, {**DEFAULT_CHOICES, "model": "mobilellm_140m", "training": "pretrain_phase1"})
    if options.engine == "ray":
        from cheaper.data.convert_cluster import convert_on_ray as convert_mixture
    else:
        from cheaper.data.convert import convert_mixture

    convert_mixture(config.data, config.data.row_length, options.processes, options.only)
    return 0


def cache_teacher(args: list[str]) -> int:
    """Keeps what a teacher says of every token of a mixture, for ``training.teacher_cache``."""
    parser = ArgumentParser(prog="cheaper cache-teacher")
    parser.add_argument("--k", type=int, default=50, help="words kept, or drawn, for each token")
    parser.add_argument("--kind", choices=["sampled", "top_k"], default="sampled")
    parser.add_argument("--precision", choices=["compact", "fp32"], default="compact", help="of top_k's probabilities")
    parser.add_argument("--only", nargs="+", metavar="STREAM", help="these streams of the mixture alone")
    options, rest = parser.parse_known_args(args)
    config = load_config(rest)
    from cheaper import cache_teacher
    from cheaper.data.manifest import TeacherRecord
    from cheaper.distributed.processes import join_processes

    join_processes()
    record = TeacherRecord(options.kind, options.k, options.precision)
    with _conversion_told(rest):
        cache_teacher.cache_teacher(config, record, options.only)
    return 0


def report(args: list[str]) -> int:
    """Writes what runs did as one HTML file, several runs overlaid."""
    parser = ArgumentParser(prog="cheaper report")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, such as runs/mine")
    parser.add_argument("--output", type=Path, help="by default report.html in the run folder, or here for several")
    parser.add_argument("--png", action="store_true", help="the curves as a picture too, beside it")
    options = parser.parse_args(args)
    from cheaper.report.page import write_page
    from cheaper.report.runs import load_runs

    runs = load_runs(options.runs)
    output = options.output or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    if output.suffix != ".html":
        raise UserError(f"--output {output}: expected a file that ends with .html")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no such folder")
    write_page(runs, output)
    print(output)
    if options.png:
        from cheaper.report.picture import write_picture

        write_picture(runs, output.with_suffix(".png"))
        print(output.with_suffix(".png"))
    return 0


def consolidate(args: list[str]) -> int:
    """Puts the shards of a checkpoint together in one file."""
    parser = ArgumentParser(prog="cheaper consolidate")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, for its newest checkpoint, or a checkpoint")
    parser.add_argument("--output", type=Path, help="by default the checkpoint's name with .pt, beside it")
    options = parser.parse_args(args)
    from cheaper import checkpoints
    from cheaper.files import newest_checkpoint

    source = newest_checkpoint(options.run) or options.run
    output = options.output or source.with_suffix(".pt")
    checkpoints.consolidate(source, output)
    print(output)
    return 0


def inspect(args: list[str]) -> int:
    """Prints rows of shards as text: where documents end, and what has loss."""
    parser = ArgumentParser(prog="cheaper inspect")
    parser.add_argument("folder", type=Path, help="shards of one stream")
    parser.add_argument("--tokenizer", required=True, help="folder, hub id or tiktoken .model file")
    parser.add_argument("--first", type=int, default=0, help="number of the first row")
    parser.add_argument("--rows", type=int, default=3, help="how many")
    options = parser.parse_args(args)
    from cheaper.data.inspect import inspect_rows
    from cheaper.data.tokenize import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    for text in inspect_rows(options.folder, tokenizer, options.first, options.rows, sys.stdout.isatty()):
        print(text)
    return 0


def sample(args: list[str]) -> int:
    """Writes the small corpus of ``data=sample`` into ``data/sample``."""
    from cheaper.data.sample import write_sample

    folder = Path("data/sample")
    documents = write_sample(folder)
    print(f"{folder}: " + ", ".join(f"{count} documents of {name}" for name, count in documents.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
