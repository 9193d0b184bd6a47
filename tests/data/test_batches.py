"""From shards to batches: rows are decoded as streaming does, padded, and have loss where they should."""

import numpy as np
import pytest
import torch
from streaming import MDSWriter
from streaming.base.format import MDSReader

from cheaper.data.dataset import RowReader
from cheaper.data.streams import collate
from cheaper.losses.chunked import IGNORED


def test_rows_are_decoded_as_streaming_decodes_them(tmp_path):
    columns = {"input_ids": "ndarray:uint32", "lengths": "ndarray:uint16", "teacher": "bytes"}
    rows = [
        {"input_ids": np.arange(n, dtype=np.uint32), "lengths": np.array([1, n - 1], np.uint16), "teacher": b"x" * n}
        for n in (2, 255, 256, 65_536)
    ]
    with MDSWriter(out=str(tmp_path / "s"), columns=columns) as writer:
        for row in rows:
            writer.write(row)
        writer.flush_shard()
        shard = writer.shards[0]
    reader, own = (kind.from_json(str(tmp_path), "s", shard) for kind in (MDSReader, RowReader))
    for i, row in enumerate(rows):
        data = reader.get_sample_data(i)
        assert own.get_sample_data(i) == data
        theirs, ours = reader.decode_sample(data), own.decode_sample(data)
        assert list(ours) == list(theirs) == list(columns)
        assert ours["teacher"] == theirs["teacher"] == row["teacher"]
        for name in ("input_ids", "lengths"):
            assert ours[name].dtype == theirs[name].dtype == row[name].dtype
            assert np.array_equal(ours[name], row[name])
            assert np.array_equal(theirs[name], row[name])
    (tmp_path / "s" / shard["raw_data"]["basename"]).unlink()
    with pytest.raises(FileNotFoundError):  # upon which streaming fetches it
        own.get_sample_data(0)


def test_a_batch_of_chats_is_padded_and_has_loss_on_its_runs():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "lengths": [2, 3], "loss_lengths": [1, 2, 1, 1], "sample": 4, "stream": 0},
        {"input_ids": [3, 4, 5], "lengths": [3], "loss_lengths": [0, 3], "sample": 9, "stream": 1},
    ]
    arrays = {"input_ids": np.uint32, "lengths": np.uint8, "loss_lengths": np.uint8}
    rows = [{**row, **{name: np.array(row[name], dtype) for name, dtype in arrays.items()}} for row in rows]
    no = IGNORED
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 5, 0, 0]]
    assert batch["labels"].tolist() == [[no, 6, 7, no, 9], [3, 4, 5, no, no]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert (batch["row_tokens"], batch["row_targets"]) == ([5, 3], [3, 2])
    assert (batch["sample"], batch["stream"]) == ([4, 9], [0, 1])
    inside = collate(rows, within_documents=True)
    assert inside["labels"].tolist() == [[no, 6, no, no, 9], [3, 4, 5, no, no]]
    assert inside["document_lengths"].tolist() == [[2, 3, 0], [3, 2, 0]]


def test_text_has_loss_everywhere():
    rows = [{"input_ids": np.array([5, 0, 7], np.uint16), "lengths": np.array([3]), "sample": 0, "stream": 0}]
    assert collate(rows)["labels"].tolist() == [[5, 0, 7]]
