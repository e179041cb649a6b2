"""Tokenizers of Hugging Face directories, hub ids and GGUF files behind one interface."""

import os

from freqkv_jax.sources import resolve
from freqkv_jax.tokenizer.base import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, a hub id, or a GGUF file.

    Raises:
      ValueError: the tokenizer is damaged, inconsistent, or of a kind that is not supported.
      FileNotFoundError: nothing is there, or a directory without any tokenizer file.
      OSError: a hub id cannot be fetched.
    """
    place = resolve(path, weights=False)
    if place.is_dir():
        from freqkv_jax.tokenizer.hf import from_directory

        return from_directory(place)
    from freqkv_jax.tokenizer.gguf import from_gguf

    return from_gguf(place)
