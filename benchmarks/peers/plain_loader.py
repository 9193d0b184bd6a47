"""Streaming's own dataset over two streams, in a loader that only stacks the tokens: one epoch at each turn."""

import json
import sys

from streaming import Stream, StreamingDataset
from torch.utils.data import DataLoader, default_collate
from turns import take_turns

settings = json.loads(sys.argv[2])
dataset = StreamingDataset(
    streams=[Stream(**stream) for stream in settings["streams"].values()],
    batch_size=settings["batch_size"],
    shuffle=True,
    shuffle_seed=settings["seed"],
)
loader = DataLoader(
    dataset, settings["batch_size"], collate_fn=lambda rows: default_collate([row["input_ids"] for row in rows])
)


def epoch() -> tuple[int, int]:
    rows = total = 0
    for input_ids in loader:
        rows += len(input_ids)
        total += int(input_ids[:, 0].long().sum())
    return rows, total


take_turns(epoch)
