"""llm-foundry's first-fit packing of ``BinPackCollator``: everything in one batch at each turn, tokens alone."""

import sys

import numpy as np
import torch
from llmfoundry.data.packing import BinPackCollator
from turns import take_turns

lengths, capacity, out = np.load(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
collator = BinPackCollator(lambda examples: examples, 1, capacity, pad_token_id=0, padding_side="right")
documents = torch.arange(int(lengths.sum()), dtype=torch.int32).split(lengths.tolist())


def pack() -> list[torch.Tensor]:
    """Its rows; a single one is asked for, so that it is free to join what fits, and the others are left over."""
    examples = [{"input_ids": tokens} for tokens in documents]
    rows, _, _, rest = collator._first_fit_bin_packing(lengths.tolist(), examples, 1, capacity, [])
    return [example["input_ids"] for example in (*rows, *(row for _, row in rest))]


rows = pack()
np.savez(out, tokens=torch.cat(rows).numpy(), lengths=[len(row) for row in rows])
del rows
take_turns(lambda: len(pack()))
