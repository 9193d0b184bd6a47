"""Conversion on the machines of a Ray cluster: every stream in parts, each part a conversion of its own.

    <data.root>/<stream>/part-00000/ …    shards and manifest of some of the stream's files
    <data.root>/<stream>/index.json       of all parts; and their manifest

Which files are in a part depends on their sizes alone, so the shards are the same bytes on any cluster. A part whose
worker dies is taken up by another where it stopped; so is the whole conversion by the same command. All machines must
see the same ``data.root`` and sources, and have the same packages.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cheaper.config import DataConfig, StreamConfig
from cheaper.data.convert import chosen, convert_stream
from cheaper.data.manifest import MANIFEST, Manifest
from cheaper.data.sources import Source, file_size
from cheaper.data.tokenize import load_tokenizer
from cheaper.errors import UserError
from cheaper.files import write_atomically

PART_BYTES = 1 << 32  # of raw files: some minutes of work for a few processes
ATTEMPTS = 5  # of a part, before a worker that dies is no accident any more
SUMMED = ("source_bytes", "documents", "rows", "tokens", "skipped", "next_row")


def convert_on_ray(
    data: DataConfig, row_length: int, processes: int | None = None, only: list[str] | None = None
) -> None:
    """Converts a mixture on the cluster at ``RAY_ADDRESS``, or with Ray on this machine alone.

    Args:
        data: The mixture; ``data.root`` is a folder that all machines see.
        row_length: Tokens per row.
        processes: Worker processes of each part, 4 by default or as many as a machine has.
        only: Names of the streams to convert, all by default.

    Raises:
        UserError: As ``convert_mixture``; or ray is missing, or a part's workers keep dying.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; pip install ray") from None
    if "://" in data.root:
        raise UserError(f"--engine ray: data.root is {data.root}, expected a folder that all machines see")
    processes = processes or min(4, os.cpu_count())
    streams = {name: parts_of(name, stream) for name, stream in chosen(data, only).items()}
    ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="ERROR")
    try:
        convert = ray.remote(num_cpus=processes, max_retries=ATTEMPTS - 1)(_convert_part)
        waiting = [
            convert.remote(name, number, part, data, row_length, processes)
            for name, parts in streams.items()
            for number, part in enumerate(parts)
        ]
        with tqdm(total=len(waiting), desc=data.name, unit="part") as bar:
            while waiting:
                done, waiting = ray.wait(waiting)
                ray.get(done)
                bar.update(len(done))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except ray.exceptions.WorkerCrashedError:
        raise UserError("--engine ray: a part's workers keep dying; the same command goes on from here") from None
    finally:
        ray.shutdown()
    for name, parts in streams.items():
        manifest = _join(Path(data.root, name), data.streams.get(name) or data.held_out[name], len(parts))
        print(f"{name}: {manifest.tokens:,} tokens in {manifest.rows:,} rows, {len(parts)} parts ({data.root}/{name})")


def parts_of(name: str, stream: StreamConfig) -> list[slice]:
    """Neighbouring files of a stream, ``PART_BYTES`` or more in each part but the last."""
    parts, begin, size = [], 0, 0
    files = Source(stream.source, name).files
    for number, file in enumerate(files):
        size += file_size(file)
        if size >= PART_BYTES or number == len(files) - 1:
            parts.append(slice(begin, number + 1))
            begin, size = number + 1, 0
    return parts or [slice(None)]  # a data set has no files


def _convert_part(name: str, number: int, part: slice, data: DataConfig, row_length: int, processes: int) -> None:
    stream = data.streams.get(name) or data.held_out[name]
    tokenizer = load_tokenizer(data.tokenizer, data.trust_remote_code)
    convert_stream(f"{name}/part-{number:05d}", stream, data, tokenizer, row_length, processes, part)


def _join(folder: Path, stream: StreamConfig, parts: int) -> Manifest:
    """Makes one stream of its parts."""
    names = [f"part-{number:05d}" for number in range(parts)]
    manifests = [Manifest.read(folder / name / MANIFEST) for name in names]
    indexes = [json.loads((folder / name / "index.json").read_text()) for name in names]
    shards = [_moved(shard, name) for name, index in zip(names, indexes, strict=True) for shard in index["shards"]]
    write_atomically(folder / "index.json", json.dumps({**indexes[0], "shards": shards}).encode())
    sums = {key: sum(getattr(manifest, key) or 0 for manifest in manifests) for key in SUMMED}
    sizes = [[manifest.rows, manifest.tokens] for manifest in manifests]
    whole = dataclasses.replace(manifests[0], source=dataclasses.asdict(stream.source), parts=sizes, **sums)
    whole.write(folder / MANIFEST)
    return whole


def _moved(shard: dict[str, Any], part: str) -> dict[str, Any]:
    """An entry of a part's index, as the whole index has it."""
    files = {key: shard[key] for key in ("raw_data", "zip_data") if shard.get(key)}
    return {**shard, **{key: {**file, "basename": f"{part}/{file['basename']}"} for key, file in files.items()}}
