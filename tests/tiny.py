"""Tiny models with random weights; attention is peaked, so that mistakes show."""

import functools

import jax
import numpy as np

from freqkv_jax.config import LlamaConfig, RopeConfig


def tiny_config(num_heads: int = 4, num_kv_heads: int = 2, **changes) -> LlamaConfig:
    """Two layers, width 32, heads of 8, vocabulary 61; nothing is a power of two by chance."""
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_layers": 2,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(1e4),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(fields | changes))


def random_params(config: LlamaConfig, seed: int = 0) -> dict:
    """A parameter tree of float32 NumPy arrays; logits have a standard deviation of about 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape, gain=1.0):
        return (rng.normal(size=shape) * gain / config.hidden_size**0.5).astype(np.float32)

    def kernel(*shape, gain=1.0):
        return {"kernel": normal(*shape, gain=gain)}

    def scale():
        return {"scale": rng.uniform(0.5, 1.5, config.hidden_size).astype(np.float32)}

    e, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    params = {"embed": {"embedding": normal(config.vocab_size, e)}, "norm": scale()}
    for i in range(config.num_layers):
        params[f"layers_{i}"] = {
            "input_norm": scale(),
            "attention": {
                "q": kernel(e, q, gain=1.5),
                "k": kernel(e, kv, gain=1.5),
                "v": kernel(e, kv),
                "o": kernel(q, e),
            },
            "post_norm": scale(),
            "mlp": {"gate": kernel(e, f), "up": kernel(e, f), "down": kernel(f, e)},
        }
    if not config.tie_word_embeddings:
        params["lm_head"] = kernel(e, config.vocab_size)
    return params


def random_tokens(config: LlamaConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Token ids int32 [batch, length]."""
    rng = np.random.default_rng(1000 + seed)
    return rng.integers(0, config.vocab_size, (batch, length)).astype(np.int32)


@functools.cache
def _jitted(model):
    return jax.jit(model.apply)


def parallel_logits(model, params, tokens, size: int = 128) -> np.ndarray:
    """Logits [B, T, V] of the parallel form. Texts are padded to `size`, which changes nothing
    before the padding, so that every length runs through one program."""
    tokens = np.asarray(tokens)
    batch, length = tokens.shape
    assert length <= size
    padded = np.zeros((batch, size), np.int32)
    padded[:, :length] = tokens
    return np.asarray(_jitted(model)({"params": params}, padded))[:, :length]
