"""FreqKV in JAX: Llama models that read and write without end through a cache of fixed size."""

from freqkv_jax.config import LlamaConfig
from freqkv_jax.decode import decode, decode_scan, prefill
from freqkv_jax.generate import generate
from freqkv_jax.kv import (
    FreqKVConfig,
    FullConfig,
    KVState,
    SinkWindowConfig,
    SpectralNoveltyConfig,
)
from freqkv_jax.model.fused import fuse
from freqkv_jax.model.llama import Llama, maps
from freqkv_jax.model.params import init_params
from freqkv_jax.score import score
from freqkv_jax.sharding import make_mesh
from freqkv_jax.spectral import compress
from freqkv_jax.state_file import load_state, save_state
from freqkv_jax.tokenizer import load_tokenizer
from freqkv_jax.weights import load_pretrained, save_pretrained

__all__ = [
    "FreqKVConfig",
    "FullConfig",
    "KVState",
    "Llama",
    "LlamaConfig",
    "SinkWindowConfig",
    "SpectralNoveltyConfig",
    "compress",
    "decode",
    "decode_scan",
    "fuse",
    "generate",
    "init_params",
    "load_pretrained",
    "load_state",
    "load_tokenizer",
    "make_mesh",
    "maps",
    "prefill",
    "save_pretrained",
    "save_state",
    "score",
]
