"""Reading tokens of any number into a state: the plan of blocks, and the driver that runs it."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from freqkv_jax import programs
from freqkv_jax.compile_options import many_tokens
from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv.policy import KVPolicy
from freqkv_jax.kv.state import KVState, empty_state, grown
from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import BATCH_AXES, P, check_mesh, mesh_of, tree_path

# Weights up to so many bytes are copied into one array a block read, so that programs are compiled
# for one layer: a 135M model's first prefill on a GPU compiled for 50 s. On a mesh never: there the
# loop would move weights between devices that now stay.
SCAN_BYTES = 1 << 30
OnProgress = Callable[[int, int], Any]  # tokens done, tokens in all

# Tokens of a block, over all rows, where the caller does not say: enough to keep an accelerator
# busy, little enough for a laptop.
BLOCK_TOKENS = 8192


@dataclass(frozen=True)
class Step:
    """One block of the plan: T tokens a row, of which row i takes counts[i] from offsets[i] on."""

    kind: str  # as `programs.read`
    length: int
    offsets: np.ndarray
    counts: np.ndarray
    due: np.ndarray  # rows in which room must be made before


def plan(
    kv: KVPolicy, fills: Sequence[int], lengths: Sequence[int], block_len: int
) -> Iterator[Step]:
    """Cuts `lengths[i]` tokens a row, behind caches with `fills[i]` entries, into blocks.

    Rows fill their cache first; then all full rows read whole chunks together. What is left of a
    row when no row has a whole chunk left (or blocks are shorter than one) is read behind a cache
    in which room was made. Lengths T come from a small set, so that few programs are compiled.
    """
    fill, left = np.array(fills, np.int64), np.array(lengths, np.int64)
    done = np.zeros_like(left)
    size = None if kv.capacity is None else kv.capacity
    while left.any():
        room = left if size is None else size - fill
        full = (left > 0) & (room == 0)
        due = np.zeros_like(full)
        chunks = 0
        if not ((left > 0) & (room > 0)).any():
            total, most = int(left.max()) // kv.chunk, block_len // kv.chunk
            if total and most:
                chunks = min(total, most)  # and in the end what is left: two programs at most
            else:
                due = full
                fill = np.where(due, kv.prefix, fill)
                room = size - fill if size is not None else room
        if chunks:
            length = chunks * kv.chunk
            counts = np.minimum(left, length) * full
            rounds = -(-counts // kv.chunk)
            fill = np.where(full, kv.prefix + counts - (rounds - 1) * kv.chunk, fill)
            yield Step("chunks", length, done.copy(), counts, due)
        else:
            kind = "fresh" if not fill.any() else "more"
            counts = np.minimum(np.minimum(left, room), block_len)
            limit = block_len if size is None else min(block_len, size)
            yield Step(kind, min(_bucket(int(counts.max())), limit), done.copy(), counts, due)
            fill = fill + counts
        done, left = done + counts, left - counts


def _bucket(length: int) -> int:
    """The next of 16, 32, 48, 64, 80, 96, 112, 128, 160, ... : at most a quarter too long."""
    unit = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // unit) * unit


def roomy(slots: int) -> int:
    """Slots of an unbounded cache that is to hold `slots` entries: a power of two, at least 256."""
    return max(256, 1 << (slots - 1).bit_length())


class Runner:
    """Runs the programs of one model, with its parameters, on one device or a mesh."""

    def __init__(self, model: Llama, params: Mapping[str, Any], batch: int) -> None:
        refuse_tracers(params)
        self.model, self.batch = model, batch
        self.mesh = mesh_of(params)
        if self.mesh is not None:
            check_mesh(model.config, self.mesh, batch)
        self.variables = {"params": params, "maps": placed_maps(model.kv, self.mesh)}
        small = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= SCAN_BYTES
        self.reading = model.clone(scan_layers=small and self.mesh is None)

    def __call__(self, program: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Runs a function of `programs` on arrays `args`; the state among them is donated."""
        model = self.reading if program in READERS else self.model
        with self.context():
            return compiled(program, self.mesh, model.kv)(model, self.variables, *args, **static)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The mesh, set, or nothing."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def empty(self, slots: int | None) -> KVState:
        """A state that has read nothing, on the mesh."""
        kv, model = self.model.kv, self.model
        if self.mesh is None:
            return empty_state(model.config, kv, self.batch, model.dtype, slots)
        make = functools.partial(empty_state, model.config, kv, self.batch, model.dtype, slots)
        with self.context():
            return jax.jit(make, out_shardings=state_prefix(self.mesh, kv))()

    def check_state(self, state: KVState) -> None:
        """ValueError if the state is another policy's, model's or batch's."""
        refuse_tracers(state)
        check_state(self.model, state, self.batch)

    def with_slots(self, state: KVState, slots: int) -> KVState:
        """An unbounded state with at least `slots` slots; a bounded one as it is."""
        if self.model.kv.capacity is not None or state.slots >= slots:
            return state
        with self.context():
            return jax.jit(grown, static_argnames="slots")(state, slots=roomy(slots))

    def make_room(self, state: KVState, due: np.ndarray) -> KVState:
        """Makes room in the rows that are due, at the cost of these rows where that is possible."""
        if due.all():
            return self(programs.make_room, state)
        # Indexing a sharded axis would gather the cache; a mask does not.
        if self.mesh is not None:
            return self(programs.make_room, state, due)
        for row in np.flatnonzero(due):
            state = self(programs.make_room_in_row, state, np.int32(row))
        return state

    def block_len(self, wanted: int | None) -> int:
        """Tokens a row and block."""
        if wanted is not None:
            if wanted < 1:
                raise ValueError(f"block_len must be at least 1, got {wanted}")
            return wanted
        kv = self.model.kv
        return max(BLOCK_TOKENS // self.batch, 1 if kv.capacity is None else kv.chunk)

    def steps(
        self, state: KVState | None, lengths: np.ndarray, block_len: int | None
    ) -> Iterator[tuple[Step, Callable[[KVState | None], KVState]]]:
        """The blocks to read, each with a function that readies the state for it."""
        fills = np.zeros(self.batch, np.int64) if state is None else np.asarray(state.fill)
        total = np.array(fills, np.int64)
        for step in plan(
            self.model.kv, fills.tolist(), lengths.tolist(), self.block_len(block_len)
        ):
            total = total + step.counts
            slots = int(total.max())

            def ready(state: KVState | None, step: Step = step, slots: int = slots) -> KVState:
                if state is None:
                    state = self.empty(None if self.model.kv.capacity else roomy(slots))
                state = self.with_slots(state, slots)
                return self.make_room(state, step.due) if step.due.any() else state

            yield step, ready


READERS = (programs.read_last, programs.read_scores)


@functools.lru_cache(maxsize=512)
def compiled(program: Callable[..., Any], mesh: Mesh | None, kv: KVPolicy) -> Callable[..., Any]:
    """A program of `programs` under jit: static model and options, the state donated.

    Donation is what updates caches in place: without it every step would copy all of them.
    """
    names = program.__code__.co_varnames[: program.__code__.co_argcount]
    static = [n for n in ("model", "kind", "rule", "num_steps", "uniform") if n in names]
    options: dict[str, Any] = {}
    if mesh is not None:
        rows, state = NamedSharding(mesh, P(BATCH_AXES)), state_prefix(mesh, kv)
        whole = NamedSharding(mesh, P())
        options["out_shardings"] = {
            programs.read_last: (rows, state),
            programs.read_scores: (whole, whole, state),
            programs.make_room: state,
            programs.decode_steps: (whole, rows, state),
            programs.head: rows,
        }[program]
    if program in READERS:
        options["compiler_options"] = many_tokens(mesh)
    donated = ["state"] if "state" in names else []
    return jax.jit(program, static_argnames=static, donate_argnames=donated, **options)


def state_prefix(mesh: Mesh, kv: KVPolicy) -> KVState:
    """Shardings of a state, as a prefix of its tree: memories by row and head, counters whole."""
    whole = NamedSharding(mesh, P())
    memories: Any = NamedSharding(mesh, P(BATCH_AXES, "tensor"))
    return KVState(memories, *([whole] * 3), policy=kv)  # pyright: ignore[reportArgumentType]


@functools.lru_cache(maxsize=8)
def placed_maps(kv: KVPolicy, mesh: Mesh | None) -> dict[str, dict[str, Array]]:
    """The collection "maps" on its devices, a copy on each of a mesh."""
    where = None if mesh is None else NamedSharding(mesh, P())
    # Kept for good, so they must be arrays, whatever is being traced when they are first asked for.
    with jax.ensure_compile_time_eval():
        arrays = {name: jax.device_put(array, where) for name, array in kv.constants().items()}
    return {"kv": arrays}


def check_state(model: Llama, state: KVState, batch: int) -> None:
    """ValueError if the state is another policy's, model's or batch's, by what jit knows of it."""
    if state.policy != model.kv:
        raise ValueError(
            f"the state belongs to policy {state.policy}, the model has {model.kv};"
            " use model.clone(kv=state.policy), or read the text anew"
        )
    if state.batch != batch:
        raise ValueError(
            f"the state holds {state.batch} rows, the call has {batch}; they must agree"
        )
    if len(state.layers) != model.config.num_layers:
        raise ValueError(
            f"the state has {len(state.layers)} layers, the model"
            f" {model.config.num_layers}; it belongs to another model"
        )
    slots = None if model.kv.capacity is not None else state.slots
    want = _empty_shapes(model.config, model.kv, batch, model.dtype, slots)
    wrong = _misshaped(state, want)
    if wrong:
        raise ValueError(
            f"the state's {wrong[0]}; it belongs to another model or dtype: use the one that made"
            " it, or read the text anew"
        )


@functools.lru_cache(maxsize=64)
def _empty_shapes(
    config: LlamaConfig, kv: KVPolicy, batch: int, dtype: str, slots: int | None
) -> KVState:
    return jax.eval_shape(lambda: empty_state(config, kv, batch, dtype, slots))


def _misshaped(state: KVState, want: KVState) -> list[str]:
    """What differs in shape or dtype from the leaves of `want`."""
    found, wanted = (
        {tree_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (state, want)
    )
    if found.keys() != wanted.keys():
        return [f"arrays are {', '.join(found)}, the model's {', '.join(wanted)}"]
    return [
        f"{name} is {leaf.dtype} {list(leaf.shape)}, the model's"
        f" {wanted[name].dtype} {list(wanted[name].shape)}"
        for name, leaf in found.items()
        if (leaf.shape, leaf.dtype) != (wanted[name].shape, wanted[name].dtype)
    ]


def check_logits(model: Llama, logits: Any, batch: int) -> None:
    """ValueError unless the logits are [B, V]."""
    want = (batch, model.config.vocab_size)
    if np.shape(logits) != want:
        raise ValueError(
            f"logits must be [B, V] = {list(want)}, got {list(np.shape(logits))}; give those that"
            " came with the state"
        )


def refuse_tracers(tree: Any) -> None:
    """TypeError under jit: the drivers decide on the host what to run next."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            "prefill, decode, score and generate drive compiled blocks from the host and cannot"
            " be traced by jit, grad or vmap; use fk.decode_scan, or model.apply"
        )


def checked_tokens(model: Llama, tokens: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
    """Host copies of tokens [B, T] and lengths [B], with zeros behind each row's length.

    Raises ValueError: not [B, T] integers (rows of different lengths), B or T zero, lengths outside
    1..T, ids outside the vocabulary.
    """
    refuse_tracers((tokens, lengths))
    try:
        ids = np.asarray(tokens)
    except ValueError:
        raise ValueError(
            "tokens must be integers [B, T], got rows of different lengths; pad on the right and"
            " pass lengths"
        ) from None
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tokens must be integers [B, T], got {ids.dtype} of shape {ids.shape}")
    batch, length = ids.shape
    if not batch or not length:
        raise ValueError(f"tokens must hold a row and a token at least, got [{batch}, {length}]")
    counts = np.full(batch, length) if lengths is None else np.asarray(lengths)
    if counts.shape != (batch,) or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"lengths must be one whole number a row ({batch}), got {counts.tolist()}")
    if counts.min() < 1 or counts.max() > length:
        raise ValueError(f"lengths must be 1 to {length} (T), got {counts.tolist()}")
    ids = np.where(np.arange(length)[None] < counts[:, None], ids, 0)
    vocab = model.config.vocab_size
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise ValueError(
            f"token id {int(outside[0])} is outside the vocabulary (0 to {vocab - 1});"
            " the text was encoded with another model's tokenizer"
        )
    return ids.astype(np.int32), counts.astype(np.int64)


def cut(ids: np.ndarray, step: Step, shift: int = 0) -> np.ndarray:
    """The tokens [B, T] of a step (those `shift` places further on), zeros where there are none."""
    place = step.offsets[:, None] + shift + np.arange(step.length)[None]
    inside = (np.arange(step.length)[None] < step.counts[:, None]) & (place < ids.shape[1])
    taken = np.take_along_axis(ids, np.minimum(place, ids.shape[1] - 1), axis=1)
    return np.where(inside, taken, 0).astype(np.int32)


def report(on_progress: OnProgress | None, step: Step, lengths: np.ndarray, result: Array) -> None:
    """Tells how many tokens of all rows are read, once `result` of the step is there."""
    if on_progress is not None:
        jax.block_until_ready(result)
        on_progress(int((step.offsets + step.counts).sum()), int(lengths.sum()))


def copied(state: KVState) -> KVState:
    """A state with arrays of its own, so that donating them leaves the caller's whole."""
    return jax.tree.map(jnp.copy, state)
