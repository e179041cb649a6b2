"""A state on disk: one safetensors file that knows which policy and model it belongs to."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from freqkv_jax.files import write_whole
from freqkv_jax.kv import KVState, policy_from_dict, policy_to_dict
from freqkv_jax.kv.state import empty_state
from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import check_mesh, gather, state_shardings, tree_path, wait_for_all

FORMAT = "freqkv_jax state 1"


def save_state(state: KVState, path: str | os.PathLike[str], model: Llama) -> None:
    """Writes a state to one safetensors file; the file appears whole or not at all.

    Of several processes all must call it, the first writes, and none returns before that is done.

    Raises:
      ValueError: the state is not of this model's policy. OSError: it cannot be written.
    """
    from safetensors.numpy import save_file

    if state.policy != model.kv:
        raise ValueError(
            f"the state belongs to policy {state.policy}, the model has {model.kv};"
            " save it with the model that made it"
        )
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    first, arrays = jax.process_index() == 0, {}
    for where, leaf in leaves:
        whole = gather(leaf)
        if first:
            arrays[tree_path(where)] = whole
    header = {"format": FORMAT} | {k: json.dumps(v) for k, v in _belongs_to(model).items()}
    if first:
        write_whole(path, lambda name: save_file(arrays, name, metadata=header))
    wait_for_all("save_state")


def load_state(path: str | os.PathLike[str], model: Llama, mesh: Mesh | None = None) -> KVState:
    """Reads what `save_state` wrote, onto `mesh` if one is given.

    Raises:
      ValueError: not a state file, cut short, or of another policy, model or dtype.
      OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no state file at {path}; fk.save_state writes one")
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no state file (its header says {header.get('format')!r}, not"
                    f" {FORMAT!r}); give a file that fk.save_state wrote"
                )
            _check_header(path, header, model)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}); save the state again"
        ) from None
    return _build(path, arrays, model, mesh)


def _belongs_to(model: Llama) -> dict[str, Any]:
    """What must agree between a state and the model that goes on with it."""
    text = json.dumps(model.config.to_hf(), sort_keys=True)
    return {
        "policy": policy_to_dict(model.kv),
        "model": hashlib.sha256(text.encode()).hexdigest(),
        "dtype": model.dtype,
    }


def _check_header(path: Any, header: dict[str, str], model: Llama) -> None:
    for name, want in _belongs_to(model).items():
        got = json.loads(header.get(name, "null"))
        if got == want:
            continue
        if name == "policy":
            raise ValueError(
                f"{path} was saved with policy {policy_from_dict(got)}, the model has {model.kv};"
                " load it with model.clone(kv=...) of that policy"
            )
        raise ValueError(
            f"{path} belongs to another model: its {name} is {got}, here it is {want};"
            " load the model that wrote it"
        )


def _build(path: Any, arrays: dict[str, np.ndarray], model: Llama, mesh: Mesh | None) -> KVState:
    batch = arrays["fill"].shape[0] if "fill" in arrays else 0
    slots = None
    if model.kv.capacity is None:
        slots = max((a.shape[2] for a in arrays.values() if a.ndim > 2), default=0)
    want = jax.eval_shape(lambda: empty_state(model.config, model.kv, batch, model.dtype, slots))
    leaves, tree = jax.tree_util.tree_flatten_with_path(want)
    wrong = [
        tree_path(where)
        for where, leaf in leaves
        if tree_path(where) not in arrays or arrays[tree_path(where)].shape != leaf.shape
    ]
    if wrong or len(arrays) != len(leaves):
        raise ValueError(f"{path} lacks or misshapes {wrong[:5]}; save the state again")
    state = jax.tree.unflatten(tree, [arrays[tree_path(where)] for where, _ in leaves])
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, state)
    check_mesh(model.config, mesh, batch)
    return jax.device_put(state, state_shardings(state, mesh))
