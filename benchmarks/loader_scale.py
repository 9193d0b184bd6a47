"""What a mixture's loader costs before its first batch: seconds and memory of a process, up to two trillion tokens.

    python benchmarks/loader_scale.py [--rounds 5]

The published mixture of phase 1 with indexes as conversion writes them, of shards of 64 MiB with rows of 8,192 tokens
that are cut into four; the shards themselves are not there. Ours makes ``TokenDataset`` and the order of its first
epoch; streaming's side is its ``StreamingDataset`` with the same proportions and its default shuffle, where each row of
2,048 tokens is a row of the shards, as it needs, and only for 10⁷ rows: ten times as many take a minute and
gigabytes. Every measurement is in a fresh process; its figures are above those of the process once everything is
imported. Before, it is checked that ours makes every row of a pass over 10⁷ rows come once. Prints a table, writes
``benchmarks/results/loader_scale.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from side_by_side import save, show, spread
from streaming import Stream, StreamingDataset
from streaming.base.world import World

from cheaper.compose import load_config, yaml_dir
from cheaper.data.dataset import TokenDataset, TokenStream
from cheaper.data.manifest import Manifest
from cheaper.data.mixing import Mixture
from cheaper.data.streams import epoch_rows

LENGTH, CUTS = 2_048, 4
SHARD_ROWS = 8_192  # of a training, in 64 MiB
BATCH, RANKS, NODES = 16, 8, 16
SCALES = {"ours": (10**7, 10**8, 10**9), "streaming": (10**7,)}


def mixture() -> dict[str, float]:
    """Shares of the published streams."""
    config = load_config([str(yaml_dir() / "pretrain_phase1.yaml")])
    shares = {name: stream.proportion for name, stream in config.data.streams.items()}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def write_index(folder: Path, shards: int, rows: int) -> None:
    """An ``index.json`` as ``MDSWriter`` writes it, of so many shards of so many rows."""
    columns = {"column_encodings": ["ndarray:uint32", "ndarray:uint16"], "column_names": ["input_ids", "lengths"]}
    common = {**columns, "column_sizes": [None, None], "compression": None, "format": "mds", "hashes": []}
    common |= {"samples": rows, "size_limit": 1 << 26, "version": 2, "zip_data": None}
    entries = []
    for number in range(shards):
        file = {"basename": f"shard.{number:05d}.mds", "bytes": 67_000_000, "hashes": {}}
        entries.append({**common, "raw_data": file})
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))


def measure(side: str, folder: Path, rows: int) -> dict[str, float]:
    """Seconds and MB of one set-up in this process."""
    world = World(NODES, RANKS, 2, 0)
    shards = {name: max(1, round(rows * share / SHARD_ROWS)) for name, share in mixture().items()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    before, begin = resident("VmRSS"), time.perf_counter()
    if side == "ours":
        from cheaper.config import DataConfig

        data = DataConfig(name="m", root="s3://not/there", cache=str(folder))
        streams = []
        for name, count in shards.items():
            whole = Manifest("t", "", 2**17, None, 0, LENGTH * CUTS, {}, "text", "text")
            whole.rows, whole.tokens = count * SHARD_ROWS // CUTS, count * SHARD_ROWS * LENGTH
            streams.append(TokenStream(data, name, whole.cut_into(LENGTH)))
        dataset = TokenDataset(
            streams,
            list(mixture().values()),
            shuffle=True,
            batch_size=BATCH,
            num_canonical_nodes=NODES,
            epoch_size=epoch_rows(sum(shards.values()) * SHARD_ROWS, BATCH * RANKS * NODES),
        )
    else:
        local = {name: str(folder / "m" / name) for name in shards}
        streams = [Stream(remote="s3://not/there", local=local[name], proportion=mixture()[name]) for name in shards]
        dataset = StreamingDataset(streams=streams, shuffle=True, batch_size=BATCH, num_canonical_nodes=NODES)
    made = time.perf_counter()
    from streaming.base.batching import generate_work

    dataset._set_shuffle_block_size(world)
    generate_work(dataset.batching_method, dataset, world, 0, 0)
    end = time.perf_counter()
    lasting = resident("VmRSS") - before
    peak = resident("VmHWM") - before
    return {"seconds": end - begin, "of_them_order": end - made, "peak_mb": peak / 1e6, "mb": lasting / 1e6}


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def check_once() -> None:
    shares = list(mixture().values())
    sizes = [np.full(max(1, round(10**7 * share / SHARD_ROWS)), SHARD_ROWS) for share in shares]
    total = sum(int(size.sum()) for size in sizes)
    made = Mixture([size.sum() for size in sizes], sizes, 17, shuffle=True)
    times, epoch = np.zeros(total, np.uint8), epoch_rows(total, BATCH * RANKS * NODES)
    for begin in range(0, total, epoch):
        times[made.rows(begin, min(begin + epoch, total))] += 1
    assert (times == 1).all()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs=3, metavar=("SIDE", "FOLDER", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        side, folder, rows = options.only
        print(json.dumps(measure(side, Path(folder), int(rows))), flush=True)
        os._exit(0)  # nothing was begun that has to be ended
    check_once()
    results: dict[str, dict[str, object]] = {}
    for rows in SCALES["ours"]:
        with tempfile.TemporaryDirectory() as temporary:
            for side in SCALES:
                for name, share in mixture().items():
                    shards = max(1, round(rows * share / SHARD_ROWS))
                    write_index(Path(temporary, side, "m", name), shards, SHARD_ROWS // (CUTS if side == "ours" else 1))
            for side in [side for side in SCALES if rows in SCALES[side]]:
                command = [sys.executable, __file__, "--only", side, f"{temporary}/{side}", str(rows)]
                rounds = [
                    json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                    for _ in range(options.rounds)
                ]
                figures = {key: spread([round_[key] for round_ in rounds]) for key in rounds[0]}
                results[f"{side}, {rows:.0e} rows"] = {"tokens": rows * LENGTH, **figures}
    save("loader_scale", {"results": results}, ("torch", "mosaicml-streaming"))
    head = ("set-up of a process", "tokens", "seconds", "of them the order", "MB", "MB at most")
    keys = ("seconds", "of_them_order", "mb", "peak_mb")
    lines = [(name, f"{r['tokens']:.1e}", *(f"{r[key]['median']:.4g}" for key in keys)) for name, r in results.items()]
    show([head, *lines])


if __name__ == "__main__":
    main()
