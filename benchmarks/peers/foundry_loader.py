"""llm-foundry's text data loader over two streams, as its train command builds it: one epoch at each turn."""

import json
import sys

from llmfoundry.data.text_data import build_text_dataloader
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from turns import take_turns

settings = json.loads(sys.argv[2])
words = Tokenizer(models.WordLevel({"<pad>": 0}))  # tells the collator which id is padding; no row has any
loader = build_text_dataloader(
    tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"),
    device_batch_size=settings["batch_size"],
    dataset={
        "streams": settings["streams"],
        "shuffle": True,
        "shuffle_seed": settings["seed"],
        "max_seq_len": settings["sequence_length"],
    },
    drop_last=False,
    num_workers=0,
    pin_memory=False,
    prefetch_factor=None,
    persistent_workers=False,
).dataloader


def epoch() -> tuple[int, int]:
    rows = total = 0
    for batch in loader:
        rows += len(batch["input_ids"])
        total += int(batch["input_ids"][:, 0].sum())
    return rows, total


take_turns(epoch)
