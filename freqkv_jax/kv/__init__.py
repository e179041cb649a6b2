"""Cache policies. Adding one: its file, and its import here."""

from freqkv_jax.kv.freqkv import FreqKVConfig
from freqkv_jax.kv.freqkv_values import FreqKVValuesConfig
from freqkv_jax.kv.full import FullConfig
from freqkv_jax.kv.h2o import H2OConfig
from freqkv_jax.kv.knorm import KeyNormConfig
from freqkv_jax.kv.novelty import SpectralNoveltyConfig
from freqkv_jax.kv.novelty_true import TrueNoveltyConfig
from freqkv_jax.kv.pair_average import PairAverageConfig
from freqkv_jax.kv.policy import (
    POLICIES,
    KVPolicy,
    policy_from_args,
    policy_from_dict,
    policy_to_dict,
)
from freqkv_jax.kv.random_keep import RandomConfig
from freqkv_jax.kv.sink_window import SinkWindowConfig
from freqkv_jax.kv.snapkv import SnapKVConfig
from freqkv_jax.kv.state import KVState

__all__ = [
    "POLICIES",
    "FreqKVConfig",
    "FreqKVValuesConfig",
    "FullConfig",
    "H2OConfig",
    "KVPolicy",
    "KVState",
    "KeyNormConfig",
    "PairAverageConfig",
    "RandomConfig",
    "SinkWindowConfig",
    "SnapKVConfig",
    "SpectralNoveltyConfig",
    "TrueNoveltyConfig",
    "policy_from_args",
    "policy_from_dict",
    "policy_to_dict",
]
