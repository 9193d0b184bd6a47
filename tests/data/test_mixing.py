"""The order of a mixture: shares at every moment, the same order for any number of processes, nothing lost."""

import numpy as np
import pytest
from streaming import MDSWriter, Stream
from streaming.base.world import World

from cheaper.compose import load_config, yaml_dir
from cheaper.data.mixing import interleave, order_evenly
from cheaper.data.shared_memory import remove_stale_shared_memory
from cheaper.data.streams import MixedTokenDataset

COLUMNS = {"input_ids": "ndarray:uint16", "lengths": "ndarray:uint16"}


def make(folder, rows: dict[str, int], proportions: dict[str, float], **arguments) -> MixedTokenDataset:
    remove_stale_shared_memory()
    for name, count in rows.items():
        if not (folder / name).exists():
            with MDSWriter(out=str(folder / name), columns=COLUMNS, size_limit=20_000) as writer:
                for i in range(count):
                    tokens = np.array([i // 60_000, i % 60_000], np.uint16)
                    writer.write({"input_ids": tokens, "lengths": np.array([2], np.uint16)})
    streams = [Stream(local=str(folder / name), proportion=proportions[name]) for name in rows]
    settings = {"batch_size": 4, "shuffle": True, "num_canonical_nodes": 1, "shuffle_seed": 3, **arguments}
    dataset = MixedTokenDataset(streams=streams, **settings)
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))
    return dataset


def global_order(dataset, nodes: int, ranks: int, workers: int, epoch: int = 0, begin: int = 0) -> np.ndarray:
    """Sample ids in the order in which all ranks together consume them, batch by batch; each batch sorted."""
    places = order_evenly(dataset, World(nodes, ranks, workers, 0), epoch, begin)
    batches = places.transpose(3, 2, 0, 1, 4).reshape(-1, nodes * ranks * places.shape[-1])  # batch, worker, node, rank
    return np.sort(batches, axis=1)


def test_interleave_keeps_every_prefix_within_a_row_of_its_share():
    counts = [700, 200, 90, 9, 1]
    order = interleave(counts, seed=1)
    assert sorted(order) == list(range(1000))
    stream = np.repeat(np.arange(5), counts)[order]
    for i, count in enumerate(counts):
        consumed = np.cumsum(stream == i)
        asked = count / 1000 * np.arange(1, 1001)
        assert np.abs(consumed - asked).max() <= 1 + count / 1000
        begin = sum(counts[:i])
        assert (np.diff(order[stream == i]) > 0).all()  # each stream in its own order
        assert order[stream == i][0] == begin


def test_ten_thousand_steps_of_the_published_mixture(tmp_path):
    """Phase 1's shares on small shards, 16 rows a step, at every one of 10,000 steps and at the end."""
    config = load_config([str(yaml_dir() / "pretrain_phase1.yaml")])
    asked = {name: stream.proportion for name, stream in config.data.streams.items()}
    rows = {name: 100 + 37 * i for i, name in enumerate(asked)}
    dataset = make(tmp_path, rows, asked, batch_size=16, epoch_size=40_000)
    stream_of_sample = np.repeat(np.arange(len(rows)), dataset.samples_per_stream)
    streams = np.concatenate([stream_of_sample[global_order(dataset, 1, 1, 1, epoch)] for epoch in range(4)])
    assert streams.shape == (10_000, 16)
    consumed = np.stack([np.cumsum((streams == i).sum(1)) for i in range(len(rows))], axis=1)
    asked_share = np.array(list(asked.values())) / sum(asked.values())
    share = consumed / (16 * np.arange(1, 10_001))[:, None]
    assert np.abs(share[-1] - asked_share).max() < 1e-4
    assert np.abs(share[200:] - asked_share).max() < 0.005
    in_one_step = consumed - 16 * np.arange(1, 10_001)[:, None] * asked_share
    assert np.abs(in_one_step).max() < 10  # never more than a few rows away


@pytest.mark.parametrize("canonical_nodes", [1, 2])
def test_the_order_is_the_same_for_any_number_of_processes_and_after_a_resume(tmp_path, canonical_nodes):
    dataset = make(tmp_path, {"a": 331, "b": 77}, {"a": 0.7, "b": 0.3}, num_canonical_nodes=canonical_nodes)
    dataset.batch_size = 8
    one = global_order(dataset, 1, 1, 1)
    assert set(one.flatten()) <= set(range(-1, 408))
    for nodes, ranks, workers, batch in ((1, 2, 1, 4), (1, 4, 2, 2), (2, 2, 1, 2), (1, 1, 3, 8)):
        dataset.batch_size = batch
        many = global_order(dataset, nodes, ranks, workers)
        steps = min(len(one), len(many)) - 1  # the last step is filled up differently
        assert np.array_equal(one[:steps], many[:steps]), (nodes, ranks, workers)
        later = global_order(dataset, nodes, ranks, workers, begin=8 * 6)
        steps = min(len(one) - 6, len(later)) - 1
        assert np.array_equal(one[6 : 6 + steps], later[:steps])


def test_epochs_differ_and_an_epoch_without_repeats_shows_each_row_once(tmp_path):
    rows = {"a": 350, "b": 150}
    dataset = make(tmp_path, rows, {"a": 0.7, "b": 0.3})
    first, second = (global_order(dataset, 1, 1, 1, epoch) for epoch in (0, 1))
    assert sorted(first.flatten()) == sorted(second.flatten()) == list(range(500))
    assert not np.array_equal(first, second)


def test_each_row_knows_its_stream_and_number(tmp_path):
    dataset = make(tmp_path, {"a": 50, "b": 30}, {"a": 0.5, "b": 0.5})
    for sample in (0, 49, 50, 79):
        row = dataset[sample]
        assert row["sample"] == sample
        assert row["stream"] == int(sample >= 50)
        assert row["input_ids"][1] == sample - 50 * (sample >= 50)
