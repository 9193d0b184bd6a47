"""The order of a mixture: shares at every moment, every row once a pass, the same order for any number of processes."""

import numpy as np
import pytest
from streaming import MDSWriter
from streaming.base.world import World

from cheaper.compose import load_config, yaml_dir
from cheaper.config import DataConfig
from cheaper.data.dataset import RowFinder, TokenDataset, TokenStream, order_mixed
from cheaper.data.manifest import Manifest
from cheaper.data.mixing import SHUFFLED_TOGETHER, Mixture
from cheaper.data.shared_memory import release, remove_stale_shared_memory
from cheaper.data.streams import MOST_EPOCH_ROWS, epoch_rows

COLUMNS = {"input_ids": "ndarray:uint16", "lengths": "ndarray:uint16"}
ROW = 8  # tokens of a row of the shards
made: list[TokenDataset] = []


@pytest.fixture(autouse=True)
def release_what_was_made():
    yield
    while made:
        release(made.pop())


def manifest(tokens: int) -> Manifest:
    return Manifest("t", "", 2**16, None, 0, ROW, {}, "text", "text", rows=-(-tokens // ROW), tokens=tokens)


def make(folder, tokens: dict[str, int], shares: list[float] | None, cut: int = ROW, **arguments) -> TokenDataset:
    """Streams of ascending token ids, from 0, 10,000, 20,000 … on, whose documents end at multiples of 5."""
    remove_stale_shared_memory()
    for number, (name, count) in enumerate(tokens.items()):
        if not (folder / name).exists():
            with MDSWriter(out=str(folder / name), columns=COLUMNS, size_limit=2_000) as writer:
                for begin in range(0, count, ROW):
                    ids = np.arange(begin, min(begin + ROW, count))
                    ends = [end for end in range(5, count + 5, 5) if begin < end < begin + len(ids)]
                    lengths = np.diff([begin, *ends, begin + len(ids)])
                    row = {"input_ids": ids + 10_000 * number, "lengths": lengths}
                    writer.write({key: value.astype(np.uint16) for key, value in row.items()})
    data = DataConfig(name="m", root=str(folder))
    streams = [TokenStream(data, name, manifest(count).cut_into(cut)) for name, count in tokens.items()]
    settings = {"batch_size": 4, "shuffle": True, "num_canonical_nodes": 1, "shuffle_seed": 3, **arguments}
    made.append(TokenDataset(streams, shares, **settings))
    return made[-1]


def global_order(dataset, nodes: int, ranks: int, workers: int, epoch: int = 0, begin: int = 0) -> np.ndarray:
    """Sample ids in the order in which all ranks together consume them, batch by batch; each batch sorted."""
    places = order_mixed(dataset, World(nodes, ranks, workers, 0), epoch, begin)
    batches = places.transpose(3, 2, 0, 1, 4).reshape(-1, nodes * ranks * places.shape[-1])  # batch, worker, node, rank
    return np.sort(batches, axis=1)


def mixture(sizes: list[int], shares: list[float], shuffle: bool = True) -> Mixture:
    return Mixture(shares, [np.array([size // 3, size - size // 3]) for size in sizes], seed=1, shuffle=shuffle)


def test_every_prefix_is_within_a_row_of_its_shares():
    sizes, shares = [700, 200, 90, 9, 1], np.array([0.35, 0.5, 0.09, 0.059, 0.001])
    made = mixture(sizes, shares.tolist(), shuffle=False)
    rows = made.rows(0, 1000)
    stream = np.repeat(np.arange(5), sizes)[rows]
    for i, share in enumerate(shares):
        consumed = np.cumsum(stream == i)
        assert np.abs(consumed - share * np.arange(1, 1001)).max() <= 1 + share
        own = rows[stream == i] - sum(sizes[:i])
        assert np.array_equal(own, np.arange(len(own)) % sizes[i])  # in its own order, over and over
    assert np.array_equal(made.counts(1000), np.bincount(stream))


def test_pieces_of_any_size_are_the_same_sequence():
    made = mixture([700, 200, 90, 9, 1], [0.35, 0.5, 0.09, 0.059, 0.001])
    whole = made.rows(0, 3000)
    for size in (1, 37, 1000):
        assert np.array_equal(np.concatenate([made.rows(a, min(a + size, 3000)) for a in range(0, 3000, size)]), whole)
    counts = np.stack([made.counts(total) for total in range(3001)])
    assert (counts.sum(1) == np.arange(3001)).all()
    assert set(np.diff(counts, axis=0).flatten()) == {0, 1}


def test_streams_of_the_same_shape_do_not_move_in_step_and_passes_differ():
    made = Mixture([1, 1], [np.full(4, 50)] * 2, seed=1, shuffle=True)
    first, second, again = made.stream_rows(0, 0, 200), made.stream_rows(1, 0, 200), made.stream_rows(0, 200, 400)
    assert sorted(first) == sorted(again) == sorted(second - 200) == list(range(200))
    assert not np.array_equal(first, second - 200)
    assert not np.array_equal(first, again)
    assert not np.array_equal(first, Mixture([1, 1], [np.full(4, 50)] * 2, seed=2, shuffle=True).stream_rows(0, 0, 200))


@pytest.mark.parametrize("rows", [1200, 3 * SHUFFLED_TOGETHER])
def test_rows_of_neighbouring_shards_are_shuffled_together(rows):
    """Wherever a pass is cut, and however few shards are in use at a time."""
    shards = np.full(12, rows // 12)
    made = Mixture([1], [shards], seed=5, shuffle=True)
    order = made.stream_rows(0, 0, rows)
    assert np.array_equal(np.sort(order), np.arange(rows))
    third = rows // 3
    parts = [made.stream_rows(0, begin, begin + third) for begin in range(0, rows, third)]
    assert np.array_equal(np.concatenate(parts)[:rows], order)
    in_use = set(order[: rows // 12] // (rows // 12))
    assert len(in_use) == min(12, SHUFFLED_TOGETHER * 12 // rows)


def test_ten_million_rows_come_once_a_pass_over_epochs_of_a_bounded_size():
    """Of the published mixture, each stream as large as its share, in shards of 8,192 rows."""
    config = load_config([str(yaml_dir() / "pretrain_phase1.yaml")])
    total, step = 10**7, 16 * 128
    sizes = [round(total * stream.proportion / 100) for stream in config.data.streams.values()]
    shards = [np.array([8192] * (size // 8192) + [size % 8192]) for size in sizes]
    made, epoch = Mixture(sizes, shards, seed=17, shuffle=True), epoch_rows(sum(sizes), step)
    assert epoch % step == 0
    assert epoch <= MOST_EPOCH_ROWS < sum(sizes)
    times = np.zeros(sum(sizes), np.uint8)
    for begin in range(0, sum(sizes), epoch):
        times[made.rows(begin, min(begin + epoch, sum(sizes)))] += 1
    assert (times == 1).all()


def test_ten_thousand_steps_of_the_published_mixture():
    """Phase 1's shares on small shards, 16 rows a step, at every one of 10,000 steps and at the end."""
    config = load_config([str(yaml_dir() / "pretrain_phase1.yaml")])
    asked = np.array([stream.proportion for stream in config.data.streams.values()])
    sizes = [100 + 37 * i for i in range(len(asked))]
    made = mixture(sizes, asked.tolist())
    rows = np.concatenate([made.rows(40_000 * epoch, 40_000 * (epoch + 1)) for epoch in range(4)])
    streams = np.repeat(np.arange(len(sizes)), sizes)[rows].reshape(10_000, 16)
    consumed = np.stack([np.cumsum((streams == i).sum(1)) for i in range(len(asked))], axis=1)
    share = asked / asked.sum()
    assert np.abs(consumed[-1] / 160_000 - share).max() < 1e-5
    assert np.abs(consumed - 16 * np.arange(1, 10_001)[:, None] * share).max() <= 1 + share.max() * len(asked)


@pytest.mark.parametrize("canonical_nodes", [1, 2])
def test_the_order_is_the_same_for_any_number_of_processes_and_after_a_resume(tmp_path, canonical_nodes):
    tokens = {"a": 331 * ROW, "b": 77 * ROW}
    dataset = make(tmp_path, tokens, [0.7, 0.3], epoch_size=400, num_canonical_nodes=canonical_nodes)
    dataset.batch_size = 8
    one = global_order(dataset, 1, 1, 1)
    assert set(one.flatten()) <= set(range(408))
    for nodes, ranks, workers, batch in ((1, 2, 1, 4), (1, 4, 2, 2), (2, 2, 1, 2), (1, 1, 3, 8)):
        dataset.batch_size = batch
        many = global_order(dataset, nodes, ranks, workers)
        assert np.array_equal(one, many[: len(one)]), (nodes, ranks, workers)
        assert (many[len(one) :] == -1).all()
        later = global_order(dataset, nodes, ranks, workers, begin=8 * 6)
        assert np.array_equal(one[6:], later[: len(one) - 6])


@pytest.mark.parametrize("cut", [ROW, 4, 2])
def test_rows_of_the_shards_are_cut_into_rows_of_the_training(tmp_path, cut):
    counts = {"a": 50 * ROW - 1, "b": 3 * ROW + 5}  # each stream's last row is short, and cut into fewer
    dataset = make(tmp_path, counts, None, cut=cut, shuffle=False)
    expected = [
        np.arange(begin, min(begin + cut, count)) + 10_000 * number
        for number, count in enumerate(counts.values())
        for begin in range(0, count, cut)
    ]
    assert len(dataset.shards) > 2
    assert dataset.size == len(expected) == sum(manifest(count).cut_into(cut).rows for count in counts.values())
    for sample, ids in enumerate(expected):
        row = dataset[sample]
        assert np.array_equal(row["input_ids"], ids)
        assert (row["sample"], row["stream"]) == (sample, int(ids[0] >= 10_000))
        begin = ids[0] % 10_000
        borders = [end for end in range(5, 1000, 5) if begin < end < begin + len(ids)]
        # Where documents end, and where the shards' rows do.
        borders = sorted(
            {begin, begin + len(ids), *borders, *range(ROW, 1000, ROW)} & {*range(begin, begin + len(ids) + 1)}
        )
        assert row["lengths"].tolist() == np.diff(borders).tolist()
        assert row["lengths"].dtype == np.uint16
    with pytest.raises(IndexError):
        dataset[len(expected)]


def test_a_stream_of_several_parts_is_cut_at_the_end_of_each(tmp_path):
    joined = Manifest("t", "", 9, None, 0, ROW, {}, "text", "text", rows=5, tokens=33, parts=[[2, 12], [3, 21]])
    cut = joined.cut_into(4)
    assert (cut.rows, cut.cuts) == (3 + 6, 2)
    with MDSWriter(out=str(tmp_path / "s"), columns={"input_ids": "ndarray:uint16"}, size_limit=220) as writer:
        for _ in range(5):
            writer.write({"input_ids": np.zeros(ROW, np.uint16)})
    stream = TokenStream(DataConfig(root=str(tmp_path)), "s", cut)
    shards = [shard.samples for shard in stream.get_shards(World(1, 1, 1, 0), False)]
    assert shards == [2, 1, 2, 2, 2]


def test_chats_and_rows_of_other_lengths_are_not_cut():
    for length in (3, 16):
        with pytest.raises(ValueError, match=f"rows of {ROW} tokens, which cannot be cut into {length}"):
            manifest(100).cut_into(length)
    with pytest.raises(ValueError, match="cannot be cut"):
        Manifest("t", "", 9, None, 0, ROW, {}, "messages", "", chat_template="x", rows=5).cut_into(4)


def test_rows_are_found_in_their_shards():
    sizes = np.array([3, 1, 5])
    finder = RowFinder(sizes)
    expected = [(shard, place) for shard, size in enumerate(sizes) for place in range(size)]
    assert [finder[np.int64(row)] for row in range(9)] == expected
    with pytest.raises(IndexError):
        finder[9]
