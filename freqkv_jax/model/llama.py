"""The Llama decoder in Linen: parameters live here, the cache is an argument and a result."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from freqkv_jax import sharding
from freqkv_jax.config import LlamaConfig
from freqkv_jax.folding import MAPPED
from freqkv_jax.kv import KVPolicy, KVState
from freqkv_jax.kv.policy import Maps, Memory
from freqkv_jax.model import cudnn, fused
from freqkv_jax.model.attention import check_backend
from freqkv_jax.model.layers import MLP, Embed, Linear, RMSNorm
from freqkv_jax.model.scan import scan_layers, scan_whole
from freqkv_jax.model.self_attention import Attention
from freqkv_jax.rope import Rope
from freqkv_jax.sharding import BATCH_AXES, P, constrain

DTYPES = ("float32", "bfloat16", "float16")
# In half precision XLA pads and cuts every product on NVIDIA whose rows are no multiple of this:
# 30 ms of the 7B shape's 930 at 32740 tokens. So the rows of many tokens are padded once.
ROW_UNIT, MANY_ROWS = 8, 256
# What the backward pass finds of a layer: all of it; its products with weights and with the map;
# what attention gives, too; or its input.
_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(MAPPED),
)
REMAT = {
    # Gathered weights are gathered again: all layers' would fill the memory.
    "none": jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED),
    "attention": jax.checkpoint_policies.save_from_both_policies(_DOTS, cudnn.keeps),
    "dots": _DOTS,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """One decoder layer."""

    config: LlamaConfig
    kv: KVPolicy
    dtype: str
    backend: str

    def setup(self) -> None:
        self.input_norm = RMSNorm(self.config.rms_norm_eps, self.dtype)
        self.attention = Attention(self.config, self.kv, self.dtype, self.backend)
        self.post_norm = RMSNorm(self.config.rms_norm_eps, self.dtype)
        self.mlp = MLP(self.config, self.dtype)

    def _feed_forward(self, x: Array) -> Array:
        return x + self.mlp(self.post_norm(x))

    def __call__(self, x: Array, rope: Rope, maps: Maps, length: int) -> Array:
        return self._feed_forward(x + self.attention(self.input_norm(x), rope, maps, length))

    def block(self, x: Array, memory: Memory, *args: Any) -> tuple[Array, Memory]:
        out, memory = self.attention.block(self.input_norm(x), memory, *args)
        return self._feed_forward(x + out), memory

    def extend(self, x: Array, memory: Memory, *args: Any) -> tuple[Array, Memory]:
        out, memory = self.attention.extend(self.input_norm(x), memory, *args)
        return self._feed_forward(x + out), memory


class Llama(nn.Module):
    """A Llama whose cache follows the policy `kv`. Frozen, hashable, compared by value.

    Attributes:
      config: sizes. kv: cache policy. dtype: of activations ("float32", "bfloat16", "float16").
      attention: back end (freqkv_jax.model.attention.BACKENDS).
      remat: what training recomputes: "none", "attention" (all but products and attention), "dots"
        (all but products) or "full".
      scan_layers: the layers are a loop over their stacked weights (freqkv_jax.model.scan).

    `apply({"params": p, "maps": maps(model)}, tokens)` is the parallel form, int [B, T] to float32
    logits [B, T, V]; without "maps" the policy's arrays are built in place. With parameters on a
    mesh, call it (and its jit) in `with jax.set_mesh(mesh):`; `make_mesh` says why.
    """

    config: LlamaConfig
    kv: KVPolicy
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    scan_layers: bool = False

    def setup(self) -> None:
        check_model_options(self.dtype, self.attention)
        self.kv.check_dtype(self.dtype)
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is unknown; allowed: {', '.join(REMAT)}")
        self.embed = Embed(self.config, self.dtype)
        self.layers = [
            Block(self.config, self.kv, self.dtype, self.attention)
            for _ in range(self.config.num_layers)
        ]
        self.norm = RMSNorm(self.config.rms_norm_eps, self.dtype)
        if not self.config.tie_word_embeddings:
            self.lm_head = Linear(self.config.vocab_size, self.dtype)

    @property
    def rope(self) -> Rope:
        """The rotation of queries and keys."""
        return Rope(self.config.rope, self.config.head_dim)

    def _maps(self) -> Maps:
        if self.has_variable("maps", "kv"):
            return self.get_variable("maps", "kv")
        return {name: jnp.asarray(array) for name, array in self.kv.constants().items()}

    def _embed(self, tokens: Array, gather: bool = False) -> Array:
        return constrain(self.embed(tokens, gather), P(BATCH_AXES, None, None))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Final hidden states of the parallel form, from an empty cache."""
        rope, maps, length = self.rope, self._maps(), tokens.shape[1]
        x = self._embed(self._rows(tokens), gather=True)

        keeps = self.remat != "none" or sharding.splits_weights()
        if self.scan_layers:
            lone = self._lone()

            def one(variables: Any, x: Array) -> Array:
                return lone.apply(variables, x, rope, maps, length)  # pyright: ignore[reportReturnType]

            if keeps:
                # Nothing in a loop's body can be merged with what its backward pass computes again.
                one = jax.checkpoint(one, policy=REMAT[self.remat], prevent_cse=False)
            return self.norm(scan_whole(one, x, self._weights())[:, :length])

        def run(layer: Block, x: Array, maps: Maps) -> Array:
            return layer(x, rope, maps, length)

        if keeps:
            run = nn.remat(run, policy=REMAT[self.remat])
        for layer in self.layers:
            x = run(layer, x, maps)
        return self.norm(x[:, :length])

    def _rows(self, tokens: Array) -> Array:
        """`tokens` with zeros behind them, where that is faster."""
        return jnp.pad(tokens, ((0, 0), (0, row_padding(tokens.shape[1], self.dtype))))

    def _lone(self) -> Block:
        """A layer that belongs to no model: its weights are given to it."""
        return Block(self.config, self.kv, self.dtype, self.attention, parent=None)  # pyright: ignore[reportCallIssue]

    def _weights(self) -> list[dict[str, Any]]:
        return [dict(layer.variables) for layer in self.layers]

    def _through(
        self, method: str, x: Array, state: KVState, *args: Any
    ) -> tuple[Array, list[Memory]]:
        """All layers' `method`, one behind the other; x and their memories."""
        if self.scan_layers:
            lone = self._lone()

            def one(variables: Any, x: Array, memory: Memory) -> tuple[Array, Memory]:
                return lone.apply(variables, x, memory, *args, method=method)  # pyright: ignore[reportReturnType]

            return scan_layers(one, x, self._weights(), state.layers)
        memories = []
        for layer, memory in zip(self.layers, state.layers, strict=True):
            x, memory = getattr(layer, method)(x, memory, *args)
            memories.append(memory)
        return x, memories

    def _fused(self) -> bool:
        return self.layers[0].attention.has_variable("params", "qkv")

    def _read_token(
        self, x: Array, state: KVState, fill: Array, counts: Array | None
    ) -> tuple[Array, list[Memory]]:
        """`_through("extend")` for one token of one text, with the weights of a fused tree."""
        seen, fill = state.seen[0], fill.reshape(())
        token = fused.token_at(self.config, self.kv, self.rope, seen, fill, counts)
        row, memories = x[0, 0], []
        for layer, memory in zip(self.layers, state.layers, strict=True):
            weights = layer.variables["params"]
            row, memory = fused.read_token(weights, self.config, self.kv, row, memory, token)
            memories.append(memory)
        return row[None, None], memories

    def logits(self, hidden: Float[Array, "*n E"]) -> Float[Array, "*n V"]:
        """The head, in float32."""
        if self.config.tie_word_embeddings:
            return self.embed.logits(hidden)
        return self.lm_head(hidden, jnp.float32)

    def block(
        self, tokens: Int[Array, "B T"], state: KVState, counts: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T E"], KVState]:
        """Reads whole chunks (T a multiple of Q) behind full caches, all chunks at once.

        Rows with counts > 0 must have fill = N; a row with count 0 keeps its state.
        """
        rope, maps, x = self.rope, self._maps(), self._embed(self._rows(tokens))
        length = tokens.shape[1]
        x, memories = self._through("block", x, state, state.seen, counts, rope, maps, length)
        x = x[:, :length]
        chunk = self.kv.chunk
        fill = self.kv.prefix + counts - (counts + chunk - 1) // chunk * chunk + chunk
        fill = jnp.where(counts > 0, fill, state.fill)
        return self.norm(x), _advance(state, memories, fill, counts)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        state: KVState,
        counts: Int[Array, "B"] | None = None,
        fill: int | Array | None = None,
    ) -> tuple[Float[Array, "B T E"], KVState]:
        """Reads T tokens for which there is room, each row behind its own fill.

        Args:
          counts: how many of the tokens each row reads (None: all of them).
          fill: the fill of every row that reads, if they are equal: an int (known when traced,
            fastest attention) or a scalar array (one write for the whole batch).
        """
        rope, x = self.rope, self._embed(tokens)
        at = state.fill if fill is None else fill
        if tokens.shape == (1, 1) and not isinstance(at, int) and self._fused():
            x, memories = self._read_token(x, state, at, counts)
        else:
            x, memories = self._through("extend", x, state, state.seen, at, counts, rope)
        read = jnp.full_like(state.fill, tokens.shape[1]) if counts is None else counts
        return self.norm(x), _advance(state, memories, state.fill + read, read)


def _advance(state: KVState, memories: list[Memory], fill: Array, read: Array) -> KVState:
    layers = tuple(
        jax.tree.map(lambda leaf: constrain(leaf, P(BATCH_AXES, "tensor")), memory)
        for memory in memories
    )
    return KVState(layers, fill, state.seen + read, state.end_token, state.policy)


def row_padding(length: int, dtype: str) -> int:
    """Rows to put behind `length`: up to a multiple of ROW_UNIT, where that is faster."""
    return 0 if length < MANY_ROWS or dtype == "float32" else -length % ROW_UNIT


def check_model_options(dtype: str, attention: str) -> None:
    """ValueError for a compute dtype or an attention back end that does not exist."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
    check_backend(attention)


def maps(model: Llama) -> dict[str, Maps]:
    """The constant collection "maps" of a model: the policy's arrays, float32."""
    return {"kv": {name: jnp.asarray(array) for name, array in model.kv.constants().items()}}
