"""Trains one stage, under ``python``, ``composer`` or ``torchrun``: [recipe.yaml] [group=choice …] [key=value …]."""

import sys

from cheaper.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
