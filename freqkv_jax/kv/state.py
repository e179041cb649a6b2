"""The state of a batch of texts: one memory a layer and the counters of every row."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv.policy import KVPolicy, Memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVState:
    """What a model remembers of B texts: an immutable pytree, argument and result of every call.

    Attributes:
      layers: one memory a layer, private to the policy; every leaf is [B, K, ...].
      fill: slots in use. Slots at and after it hold nothing meaningful.
      seen: tokens read.
      end_token: the end token that a row read in `decode`, -1 while it runs. A row that has one
        is frozen until it reads a new prompt.
      policy: the policy that the memories belong to (static).
    """

    layers: tuple[Memory, ...]
    fill: Int[Array, "B"]
    seen: Int[Array, "B"]
    end_token: Int[Array, "B"]
    policy: KVPolicy = dataclasses.field(metadata={"static": True})

    def kv(self, layer: int) -> tuple[Array, Array]:
        """Keys (rotated) and values of a layer as attention reads them, [B, K, slots, D] each."""
        return self.policy.view(self.layers[layer])

    @property
    def ended(self) -> Bool[Array, "B"]:
        """Rows that are frozen behind an end token."""
        return self.end_token >= 0

    @property
    def batch(self) -> int:
        """B: rows."""
        return self.fill.shape[0]

    @property
    def slots(self) -> int:
        """Slots of the arrays: N, or the room that a full cache has now."""
        return jax.eval_shape(lambda: self.policy.view(self.layers[0]))[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all memories, over all devices, as they lie in memory."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))


def empty_state(
    config: LlamaConfig, policy: KVPolicy, batch: int, dtype: str, slots: int | None = None
) -> KVState:
    """A state that has read nothing; `slots` is for unbounded policies only."""
    layers = tuple(
        policy.init(batch, config.num_kv_heads, config.head_dim, jnp.dtype(dtype), slots)
        for _ in range(config.num_layers)
    )
    # Three arrays, not one three times: a state is donated, and no buffer may be so twice.
    counters = (jnp.full((batch,), value, jnp.int32) for value in (0, 0, -1))
    return KVState(layers, *counters, policy=policy)


def grown(state: KVState, slots: int) -> KVState:
    """An unbounded policy's state with arrays of `slots` slots; leaves are [B, K, slots, ...]."""

    def grow(leaf: Array) -> Array:
        return jnp.pad(
            leaf, [(0, slots - n if axis == 2 else 0) for axis, n in enumerate(leaf.shape)]
        )

    return dataclasses.replace(state, layers=jax.tree.map(grow, state.layers))
