"""Token ids as they lie in files: their width, and whether they are the model's."""

import numpy as np

TOKEN_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(vocab_size: int) -> str:
    """uint16 where the vocabulary fits, else uint32."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def check_ids(name: str, tokens: np.ndarray, vocab_size: int, advice: str, offset: int = 0) -> None:
    """ValueError that names the first id outside the vocabulary; `advice` ends it.

    `offset`: the place of the first of `tokens` in the file `name`.
    """
    outside = np.flatnonzero(tokens >= vocab_size)
    if outside.size:
        first = int(outside[0])
        raise ValueError(
            f"{name} holds token id {int(tokens[first])} at place {first + offset}, but the model's"
            f" vocabulary is 0 to {vocab_size - 1}; {advice}"
        )
