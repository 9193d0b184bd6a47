"""llm-foundry's conversion of a JSONL file to MDS shards, as its command does it: the whole file at each turn."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

source, tokenizer, folder = sys.argv[2], sys.argv[3], Path(sys.argv[4])
os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # read when ``datasets`` is imported

from llmfoundry.command_utils import convert_dataset_json_from_args  # noqa: E402
from turns import take_turns  # noqa: E402


def convert() -> None:
    """From the file each time: what ``datasets`` keeps of the turn before is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        convert_dataset_json_from_args(
            path=source,
            out_root=str(folder / "mds"),
            compression=None,
            concat_tokens=2048,
            split="train",
            tokenizer=tokenizer,
            bos_text="<|begin_of_text|>",
            eos_text="<|end_of_text|>",
        )


take_turns(convert)
