"""Device mesh and sharding tables: ordered rules from a path in a tree to a PartitionSpec.

Batch rows lie on ("data", "fsdp"), heads and the ffn on "tensor", weights on "fsdp" as well. The
slot axis of a cache is never sharded: compress and attention need it whole, and it is short.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from freqkv_jax.config import LlamaConfig

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
GATHERED = "gathered weight"  # the name by which rematerialisation knows what `gathered` gives

# Parameter path (the whole of it) -> PartitionSpec; the first rule that matches decides.
# No catch-all rule: a weight that nothing matches is an error, not silently replicated.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"layers_\d+/(input|post)_norm/scale", P()),
    (r"layers_\d+/attention/(q|k|v)/kernel", P("fsdp", "tensor")),
    (r"layers_\d+/attention/o/kernel", P("tensor", "fsdp")),
    (r"layers_\d+/mlp/(gate|up)/kernel", P("fsdp", "tensor")),
    (r"layers_\d+/mlp/down/kernel", P("tensor", "fsdp")),
    (r"norm/scale", P()),
    (r"lm_head/kernel", P("fsdp", "tensor")),
)
# Adapters follow the kernel beside which they lie: a [in, r], b [r, out]. The rank is never split.
LORA_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"layers_\d+/(attention/(q|k|v)|mlp/(gate|up))/a", P("fsdp", None)),
    (r"layers_\d+/(attention/(q|k|v)|mlp/(gate|up))/b", P(None, "tensor")),
    (r"layers_\d+/(attention/o|mlp/down)/a", P("tensor", None)),
    (r"layers_\d+/(attention/o|mlp/down)/b", P(None, "fsdp")),
)
# What is trained: {"lora": ..., "params": ...}.
TRAINABLE_RULES = tuple((f"lora/{pattern}", spec) for pattern, spec in LORA_RULES) + tuple(
    (f"params/{pattern}", spec) for pattern, spec in RULES
)
# A tied model has no lm_head, so this rule may go unused.
OPTIONAL_RULES = (r"lm_head/kernel",)

MEMORY_SPEC = P(BATCH_AXES, "tensor")  # [B, K, ...]
HEADS_SPEC = P(BATCH_AXES, None, "tensor")  # [B, T, heads, D]
CHUNKS_SPEC = P(BATCH_AXES, None, None, "tensor")  # [B, C, ., K, D]
# Path in a KVState -> PartitionSpec.
STATE_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"layers/.+", MEMORY_SPEC),
    (r"(fill|seen|end_token)", P()),
)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with axes data, fsdp, tensor, all of type Auto.

    `prefill`, `decode`, `score` and `generate` find it by the parameters that lie on it. Your own
    jit of `model.apply` or `decode_scan` needs `with jax.set_mesh(mesh):` around the call: without
    it a kernel is not split on NVIDIA, and does not compile on TPU ("Mosaic kernels cannot be
    automatically partitioned").

    Args:
      data, fsdp, tensor: axis sizes; one of them may be -1, for "all devices that are left".
      devices: the devices to use, all of them; None takes as many as needed of `jax.devices()`.

    Raises:
      ValueError: a size below 1 (other than one -1), or a product that the devices cannot give.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    available = list(jax.devices() if devices is None else devices)
    unknown = [name for name, size in sizes.items() if size == -1]
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"mesh sizes must be 1 or more, and at most one of them -1, got {_show(sizes)}"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if unknown:
        if len(available) % known:
            raise ValueError(
                f"mesh {_show(sizes)}: {known} does not divide the {len(available)} devices;"
                " choose sizes whose product does"
            )
        sizes[unknown[0]] = len(available) // known
    needed = math.prod(sizes.values())
    if needed > len(available) or (devices is not None and needed != len(available)):
        raise ValueError(
            f"mesh {_show(sizes)} needs {needed} devices, got {len(available)};"
            " make data*fsdp*tensor equal to the number of devices (-1 fills one of them in)"
        )
    shape = tuple(sizes.values())
    grid = mesh_utils.create_device_mesh(shape, available[:needed], allow_split_physical_axes=True)
    # Auto must be asked for: jax.make_mesh gives Explicit axes when nothing is said.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _show(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def tree_path(path: tuple[Any, ...]) -> str:
    """A jax key path as text, e.g. "layers_0/attention/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def match_specs(tree: Any, rules: Sequence[tuple[str, PartitionSpec]]) -> Any:
    """A tree of PartitionSpec shaped like `tree`: the first rule that matches each leaf's path.

    Raises:
      ValueError: a leaf that no rule matches or whose rank the spec exceeds (all listed), or a
        rule that uses a mesh axis twice.
    """
    for pattern, spec in rules:
        used = [axis for entry in spec for axis in _axes_of(entry)]
        if len(used) != len(set(used)):
            raise ValueError(f"sharding rule {pattern!r} uses a mesh axis twice: {spec}")
    problems: list[str] = []

    def spec_of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = tree_path(path)
        for pattern, spec in rules:
            if re.fullmatch(pattern, name):
                if len(spec) > len(leaf.shape):
                    problems.append(f"{name} (shape {tuple(leaf.shape)} is too short for {spec})")
                return spec
        problems.append(f"{name} (no rule matches)")
        return P()

    specs = jax.tree_util.tree_map_with_path(spec_of, tree)
    if problems:
        raise ValueError(
            f"no sharding for {', '.join(problems)}; add or correct a rule in"
            " freqkv_jax/sharding.py"
        )
    return specs


def param_specs(params: Any) -> Any:
    """The PartitionSpec of every parameter, by RULES; ValueError lists leaves that none matches."""
    return match_specs(params, RULES)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every parameter (arrays or ShapeDtypeStructs) on `mesh`."""
    return _named(param_specs(params), mesh)


def lora_shardings(lora: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf of an adapter tree, by LORA_RULES."""
    return _named(match_specs(lora, LORA_RULES), mesh)


def trainable_shardings(trainable: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every trained weight, by TRAINABLE_RULES."""
    return _named(match_specs(trainable, TRAINABLE_RULES), mesh)


def unused_rules(params: Any) -> list[str]:
    """Patterns of RULES that decide no leaf of `params`, lm_head's left out (it may be tied)."""
    names = [tree_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    winners = {next((p for p, _ in RULES if re.fullmatch(p, name)), None) for name in names}
    return [p for p, _ in RULES if p not in winners and p not in OPTIONAL_RULES]


def state_specs(state: Any) -> Any:
    """The PartitionSpec of every array of a KVState, by STATE_RULES."""
    return match_specs(state, STATE_RULES)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every array of a KVState: memory by row and head, counters replicated.

    Raises ValueError where the mesh does not divide a leaf's rows or heads.
    """
    specs = state_specs(state)
    _check_leaves(state, specs, mesh)
    return _named(specs, mesh)


def batch_spec() -> PartitionSpec:
    """The spec of anything whose first axis is the batch."""
    return P(BATCH_AXES)


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The tree of NamedShardings that put a copy of every leaf on every device."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def _named(specs: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def _is_spec(leaf: Any) -> bool:
    # jax itself may or may not see a PartitionSpec as a leaf, by version.
    return isinstance(leaf, PartitionSpec)


def _axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _check_leaves(tree: Any, specs: Any, mesh: Mesh) -> None:
    problems = []
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = jax.tree.leaves(specs, is_leaf=_is_spec)
    for (path, leaf), spec in zip(leaves, flat, strict=True):
        for size, entry in zip(leaf.shape, spec, strict=False):
            parts = math.prod(mesh.shape[axis] for axis in _axes_of(entry))
            if size % parts:
                axes = "*".join(_axes_of(entry))
                problems.append(f"{tree_path(path)} axis of {size} by {axes}={parts}")
    if problems:
        raise ValueError(
            f"the mesh does not divide {'; '.join(problems)}; make the batch a multiple of"
            " data*fsdp and choose a tensor size that divides the kv heads"
        )


def check_mesh(config: LlamaConfig, mesh: Mesh, batch: int | None = None) -> None:
    """Raises ValueError naming every size of the model, or the batch, that `mesh` cannot split."""
    sizes = {axis: mesh.shape.get(axis, 1) for axis in AXES}
    tensor, fsdp = sizes["tensor"], sizes["fsdp"]
    rows = sizes["data"] * fsdp
    must_divide = [
        ("num_heads", config.num_heads, "tensor", tensor),
        ("num_kv_heads", config.num_kv_heads, "tensor", tensor),
        ("intermediate_size", config.intermediate_size, "tensor", tensor),
        ("vocab_size", config.vocab_size, "tensor", tensor),
        ("hidden_size", config.hidden_size, "fsdp", fsdp),
    ]
    if batch is not None:
        must_divide.append(("batch", batch, "data*fsdp", rows))
    problems = [
        f"{name} {size} by {axis}={parts}"
        for name, size, axis, parts in must_divide
        if size % parts
    ]
    if not problems:
        return
    common = math.gcd(config.num_kv_heads, config.intermediate_size, config.vocab_size)
    advice = f"tensor must divide {common}, fsdp must divide {config.hidden_size}"
    if batch is not None:
        advice += f", the batch must be a multiple of data*fsdp (now {rows})"
    raise ValueError(
        f"mesh {_show(sizes)} does not divide {', '.join(problems)}; {advice}: change the mesh"
        + (" or the batch" if batch is not None else "")
    )


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of the first leaf that lies on more than one device by name; None if none does."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if isinstance(mesh, Mesh) and mesh.size > 1:
            return mesh
    return None


def gather(array: Any) -> np.ndarray:
    """The whole of an array that may lie on several hosts, all of which must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def wait_for_all(what: str) -> None:
    """Returns once every process has called it for `what`, however long that takes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"freqkv_jax.{what}")


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Constrains `x` to `spec` under `jax.set_mesh(mesh)`; x itself where no mesh is set.

    Axes that the mesh lacks, or that a shard_map around us handles, are left out of the spec.
    """
    axes = _auto_axes()
    return jax.lax.with_sharding_constraint(x, _kept(spec, axes)) if axes else x


def on_each_device(function: Any, in_specs: Any, out_specs: Any) -> Any:
    """`function` as each device runs it on its own part of the arguments; specs as in `constrain`.

    What XLA cannot split (a kernel of our own) runs so on a mesh; where none is set, as it is.
    """
    axes = _auto_axes()
    if not axes:
        return function
    specs = (in_specs, out_specs)
    ins, outs = jax.tree.map(lambda spec: _kept(spec, axes), specs, is_leaf=_is_spec)
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        function, mesh=mesh, in_specs=ins, out_specs=outs, axis_names=axes, check_vma=False
    )


def splits_evenly(rows: int, heads: int) -> bool:
    """Whether `on_each_device` can split so many rows and heads: on the mesh that is set, if one
    is, there are no axes but ours, and each device gets as many."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        return True
    kinds = zip(mesh.axis_names, mesh.axis_types, mesh.axis_sizes, strict=True)
    for axis, kind, size in kinds:
        ours = kind == AxisType.Auto and axis in AXES
        if not ours and kind != AxisType.Manual and size > 1:
            return False
    rows_split = rows % math.prod(axis_size(axis) for axis in BATCH_AXES)
    return rows_split == 0 and heads % axis_size("tensor") == 0


def _auto_axes() -> set[str]:
    """Axes of the mesh that is set, those left out that a shard_map around us handles."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        return set()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis for axis, kind in kinds if kind == AxisType.Auto}


def _kept(spec: PartitionSpec, axes: set[str]) -> PartitionSpec:
    entries = []
    for entry in spec:
        kept = tuple(axis for axis in _axes_of(entry) if axis in axes)
        entries.append(kept if len(kept) > 1 else kept[0] if kept else None)
    return P(*entries)


def gathered(x: jax.Array, stored: PartitionSpec) -> jax.Array:
    """A weight that lies by `stored`, whole along "fsdp"; its gradient is split again.

    Left to itself, the compiler gathers a weight anew for each product that it is part of: when a
    layer is computed again in the backward pass, and once more for the gradient behind it.
    """
    if not splits_weights() or "fsdp" not in stored:
        return x
    return checkpoint_name(_gathered(x, stored), GATHERED)


def gathered_table(x: jax.Array, stored: PartitionSpec) -> jax.Array:
    """`gathered`, for a table in which the rows of a batch are looked up.

    Where rows lie on two axes, they cannot trade places with columns that lie on one of them: the
    gradient is summed whole.
    """
    return gathered(x, stored) if axis_size("data") == 1 else whole(x, stored)


def whole(x: jax.Array, stored: PartitionSpec) -> jax.Array:
    """What lies by `stored`, constrained to be whole along "fsdp", as its gradient then is."""
    return constrain(x, P(*(None if entry == "fsdp" else entry for entry in stored)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, stored: PartitionSpec) -> jax.Array:
    return whole(x, stored)


def _gathered_forward(x: jax.Array, stored: PartitionSpec) -> tuple[jax.Array, None]:
    return _gathered(x, stored), None


def _gathered_backward(stored: PartitionSpec, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (constrain(g, stored),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def splits_weights() -> bool:
    """Whether the mesh that is set splits weights over "fsdp"."""
    return axis_size("fsdp") > 1


def axis_size(axis: str) -> int:
    """The size of an axis of the mesh that is set; 1 where there is none, or where a shard_map
    around us handles it."""
    return jax.sharding.get_abstract_mesh().shape[axis] if axis in _auto_axes() else 1
