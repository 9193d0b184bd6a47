"""Raw text to MDS shards: [recipe.yaml] [data=…] [key=value …] [--processes N] [--only STREAM …]."""

import sys

from cheaper.cli import main

if __name__ == "__main__":  # worker processes import this file
    sys.exit(main(["convert", *sys.argv[1:]]))
