"""Key norm: keeps the entries whose keys are shortest."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax.kv.choosing import ChoosingPolicy, highest
from freqkv_jax.kv.policy import Maps, register


@register
@dataclass(frozen=True)
class KeyNormConfig(ChoosingPolicy):
    """Keeps the keys of smallest L2 norm, which tend to be attended to most (arXiv 2406.11430).

    The paper spares the first layers and keeps true positions; here every layer is treated alike
    and positions are slots, as for every policy that it is compared with. Arguments:
    see ChoosingPolicy.
    """

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "keeps the keys of smallest norm"
    keeps: ClassVar[str] = "sinks, short keys, recents"
    source: ClassVar[str] = "arXiv 2406.11430"

    def choose(self, k: Array, v: Array, maps: Maps) -> Array:
        """Shortest first; the logarithm puts all sizes of keys on the same grid."""
        return highest(-jnp.log(jnp.sum(k * k, axis=-1) + 1e-30), self.keep)
