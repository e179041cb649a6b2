"""The programs that `freqkv compile` compiles: forward, prefill and decode as abstract work."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from freqkv_jax import programs
from freqkv_jax.compile_check import (
    WHATS,
    Chip,
    Work,
    analyse,
    attention_flops,
    compile_work,
    is_cache_gather,
    useful_flops,
)
from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv.policy import KVPolicy
from freqkv_jax.kv.state import KVState
from freqkv_jax.model.llama import Llama
from freqkv_jax.model.llama import maps as model_maps
from freqkv_jax.model.params import abstract_params, abstract_state
from freqkv_jax.sampling import Draw, Sampling
from freqkv_jax.sharding import (
    BATCH_AXES,
    P,
    check_mesh,
    make_mesh,
    param_shardings,
    replicated,
    state_shardings,
)

MAX_TENSOR = 8  # beyond it the all-reduces of a layer outweigh what a chip saves
DEFAULT_CHUNKS = 4  # of prefill
DEFAULT_SEQ_LEN = 8192
DEFAULT_STEPS = 16


def default_mesh(
    config: LlamaConfig, what: str, num_devices: int, hbm_bytes: int | None = None
) -> dict[str, int]:
    """Sizes of data, fsdp and tensor for a program on so many devices.

    tensor is as large as the heads allow, at most MAX_TENSOR. What is left goes to fsdp as far as
    hidden_size allows, the rest to data; in decode to data at once where bfloat16 weights fit half
    of a device: under fsdp every step would gather them all.
    """
    heads = math.gcd(config.num_kv_heads, config.intermediate_size, config.vocab_size, num_devices)
    tensor = max(n for n in range(1, MAX_TENSOR + 1) if heads % n == 0)
    left = num_devices // tensor
    fits = hbm_bytes is None or 2 * config.num_params / tensor <= hbm_bytes / 2
    fsdp = 1 if what == "decode" and fits else math.gcd(left, config.hidden_size)
    return {"data": left // fsdp, "fsdp": fsdp, "tensor": tensor}


@dataclass(frozen=True)
class Plan:
    """What to compile, with every size settled.

    Attributes:
      seq_len: tokens of a row (forward, prefill); slots of an unbounded policy's cache.
      steps: tokens that decode generates in a row.
    """

    what: str
    model: Llama
    mesh: Mesh
    batch: int
    seq_len: int
    steps: int

    def describe(self) -> str:
        """The program in one line."""
        if self.what == "forward":
            return f"parallel form, {self.batch} rows of {self.seq_len} tokens, float32 logits"
        kv = self.model.kv
        slots = f"{self.seq_len if kv.capacity is None else kv.capacity} slots"
        if self.what == "prefill":
            start = "an empty cache" if kv.capacity is None else "a full cache"
            return (
                f"{self.batch} rows read {self.seq_len} tokens behind {start} of {slots},"
                " logits of the last token"
            )
        room = "" if kv.capacity is None else "one compression of every cache, then "
        return f"{room}{self.steps} greedy steps, {self.batch} rows, {slots}"

    def flops(self) -> tuple[float, float]:
        """FLOPs that the mathematics needs, and attention's part of them, on all devices."""
        tokens = self.steps if self.what == "decode" else self.seq_len
        given = (self.model.config, self.model.kv, self.what, self.batch, tokens, self.seq_len)
        return useful_flops(*given), attention_flops(*given)


def make_plan(
    what: str,
    config: LlamaConfig,
    kv: KVPolicy,
    devices: list[Any],
    chip: Chip | None = None,
    mesh: dict[str, int] | None = None,
    batch: int | None = None,
    seq_len: int | None = None,
    steps: int = DEFAULT_STEPS,
    dtype: str = "bfloat16",
    attention: str = "auto",
) -> Plan:
    """Settles the sizes that are left open.

    Args:
      chip: what one device is, None off TPU.
      mesh: sizes of data, fsdp, tensor; axes left out are 1, one may be -1. None: `default_mesh`.
      batch: rows; None is one for each of data*fsdp.
      seq_len: None is 8192, in prefill four chunks; prefill rounds it up to whole chunks.

    Raises:
      ValueError: an unknown program, a size below 1, or what a mesh does not divide.
    """
    if what not in WHATS:
        raise ValueError(f"program {what!r} is unknown; allowed: {', '.join(WHATS)}")
    for name, size in (("batch", batch), ("seq_len", seq_len), ("steps", steps)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size}")
    hbm = chip.hbm_bytes if chip else None
    sizes = default_mesh(config, what, len(devices), hbm) if mesh is None else mesh
    grid = make_mesh(**sizes, devices=devices)
    rows = int(grid.shape["data"] * grid.shape["fsdp"])
    batch = rows if batch is None else batch
    check_mesh(config, grid, batch)
    if what == "prefill" and kv.capacity is not None:
        wanted = DEFAULT_CHUNKS * kv.chunk if seq_len is None else seq_len
        seq_len = -(-wanted // kv.chunk) * kv.chunk
    seq_len = DEFAULT_SEQ_LEN if seq_len is None else seq_len
    if what == "decode" and steps > (kv.chunk if kv.capacity is not None else seq_len):
        room = kv.chunk if kv.capacity is not None else seq_len
        raise ValueError(f"steps {steps} do not fit the {room} slots that are free; take fewer")
    return Plan(what, Llama(config, kv, dtype, attention), grid, batch, seq_len, steps)


def build_work(plan: Plan) -> Work:
    """The jittable program of a plan and its abstract arguments, sharded as `sharding` says."""
    return {"forward": _forward, "prefill": _prefill, "decode": _decode}[plan.what](plan)


def report(plan: Plan, chip: Chip | None) -> dict[str, Any]:
    """Compiles a plan's program; what it takes, as `analyse` tells it."""
    work = build_work(plan)
    compiled = compile_work(work, plan.mesh)
    leaves = jax.tree.leaves(_state(plan).layers)
    config = plan.model.config
    is_cache = is_cache_gather(plan.what, plan.model.kv, leaves, config.head_dim)
    names = work.argument_names()
    return analyse(compiled, names, chip, plan.mesh.size, *plan.flops(), is_cache)


def _forward(plan: Plan) -> Work:
    model = plan.model

    def forward(variables: Any, tokens: jax.Array) -> Any:
        return model.apply(variables, tokens)

    return Work(
        forward,
        (_variables(plan), _tokens(plan)),
        ("variables", "tokens"),
        out_shardings=NamedSharding(plan.mesh, P(BATCH_AXES, None, "tensor")),
    )


def _prefill(plan: Plan) -> Work:
    model, state = plan.model, _state(plan)
    kind = "fresh" if model.kv.capacity is None else "chunks"

    def prefill(
        variables: Any, tokens: jax.Array, state: KVState, counts: jax.Array, last: jax.Array
    ) -> tuple[jax.Array, KVState]:
        hidden, state = programs.read_last(model, variables, tokens, state, counts, last, kind)
        return programs.head(model, variables, hidden), state

    counts = _array(plan, (plan.batch,), jnp.int32, P())
    shape = (plan.batch, model.config.hidden_size)
    last = _array(plan, shape, jnp.dtype(model.dtype), P(BATCH_AXES))
    return Work(
        prefill,
        (_variables(plan), _tokens(plan), state, counts, last),
        ("variables", "tokens", "state", "counts", "last"),
        donate=(2,),
        out_shardings=(_logits_sharding(plan), state_shardings(state, plan.mesh)),
    )


def _decode(plan: Plan) -> Work:
    model, state = plan.model, _state(plan)
    rule, draw = Sampling(True, None, False), Draw(None, None, None)

    def decode(
        variables: Any, state: KVState, logits: jax.Array
    ) -> tuple[jax.Array, jax.Array, KVState]:
        if model.kv.capacity is not None:
            state = programs.make_room(model, variables, state)
        return programs.decode_steps(
            model, variables, state, logits, draw, None, rule, plan.steps, uniform=True
        )

    shape = (plan.batch, model.config.vocab_size)
    logits = _array(plan, shape, jnp.float32, _logits_sharding(plan).spec)
    return Work(
        decode,
        (_variables(plan), state, logits),
        ("variables", "state", "logits"),
        donate=(1, 2),
        out_shardings=(
            NamedSharding(plan.mesh, P(BATCH_AXES)),
            _logits_sharding(plan),
            state_shardings(state, plan.mesh),
        ),
    )


def _array(plan: Plan, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(plan.mesh, spec))


def _with_shardings(tree: Any, shardings: Any) -> Any:
    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings)


def _tokens(plan: Plan) -> jax.ShapeDtypeStruct:
    return _array(plan, (plan.batch, plan.seq_len), jnp.int32, P(BATCH_AXES))


def _logits_sharding(plan: Plan) -> NamedSharding:
    return NamedSharding(plan.mesh, P(BATCH_AXES, "tensor"))


def _variables(plan: Plan) -> dict[str, Any]:
    params = abstract_params(plan.model.config, plan.model.dtype)
    maps = jax.eval_shape(lambda: model_maps(plan.model))
    return {
        "params": _with_shardings(params, param_shardings(params, plan.mesh)),
        "maps": _with_shardings(maps, replicated(maps, plan.mesh)),
    }


def _state(plan: Plan) -> KVState:
    slots = plan.seq_len if plan.model.kv.capacity is None else None
    state = abstract_state(plan.model, plan.batch, slots)
    return _with_shardings(state, state_shardings(state, plan.mesh))
