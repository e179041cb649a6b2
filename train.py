"""`python train.py --config FILE ...` is `freqkv train --config FILE ...`."""

import sys

from freqkv_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
