"""TRL's ``pack_dataset``, best-fit decreasing: Arrow rows in, Arrow rows out, everything in one batch at each turn."""

import sys

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_progress_bars
from trl.data_utils import pack_dataset
from turns import take_turns

lengths, capacity, out = np.load(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
disable_progress_bars()
offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
tokens = pa.ListArray.from_arrays(offsets, np.arange(offsets[-1], dtype=np.int32))
dataset = Dataset(pa.table({"input_ids": tokens}))


def pack() -> Dataset:
    return pack_dataset(dataset, capacity, strategy="bfd", map_kwargs={"batch_size": len(dataset)})


rows = pack().data["input_ids"].combine_chunks()
np.savez(out, tokens=rows.flatten(), lengths=np.diff(rows.offsets))
del rows
take_turns(lambda: len(pack()))
