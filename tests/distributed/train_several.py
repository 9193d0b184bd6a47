"""Trains several runs one after the other in these processes: arguments of each, a list of lists in JSON."""

import json
import sys

from cheaper.cli import main

for arguments in json.loads(sys.argv[1]):
    if status := main(["train", *arguments]):
        sys.exit(status)
