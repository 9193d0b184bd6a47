"""Scores a model on benchmarks: --model_path MODEL --benchmarks NAME,NAME …, under ``python`` or ``torchrun``."""

import sys

from cheaper.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
