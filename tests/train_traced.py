"""Trains several compiled runs in these processes, with graphs run eagerly: arguments of each, lists in JSON."""

import functools
import json
import sys

import torch

from cheaper.cli import main

torch.compile = functools.partial(torch.compile, backend="aot_eager")
for arguments in json.loads(sys.argv[1]):
    if status := main(["train", *arguments]):
        sys.exit(status)
    assert torch._dynamo.utils.counters["frames"]["ok"]
    assert not torch._dynamo.utils.counters["graph_break"]
