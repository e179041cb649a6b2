"""`python -m freqkv_jax` is the `freqkv` command."""

import sys

from freqkv_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
