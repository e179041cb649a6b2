"""`python eval.py TASK ...` is `freqkv eval TASK ...`."""

import sys

from freqkv_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
