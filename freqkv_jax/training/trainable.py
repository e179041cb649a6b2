"""What is trained and what is frozen, as two trees.

trainable is {"lora": adapters, "params": subset of the parameters}, float32 masters; frozen holds
the parameters that are not trained, in the compute dtype. Gradients, moments and donation know
the first tree only.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from freqkv_jax.config import LlamaConfig
from freqkv_jax.model import lora
from freqkv_jax.model.params import abstract_params
from freqkv_jax.sharding import tree_path

if TYPE_CHECKING:
    from freqkv_jax.training.schema import TrainSection

MODES = ("lora", "full", "norms")


def is_trained(train: "TrainSection", path: str) -> bool:
    """Whether the parameter at `path` is itself trained (an adapted kernel is not).

    Embeddings are the input embedding, as in the paper's recipe; it is the head of a tied model.
    """
    if train.mode not in MODES:
        raise ValueError(f"train.mode {train.mode!r} is unknown; allowed: {', '.join(MODES)}")
    if train.mode == "full":
        return True
    if path.endswith("norm/scale"):
        return train.mode == "norms" or train.train_norms
    return path == "embed/embedding" and train.mode == "lora" and train.train_embeddings


def lora_scale(train: "TrainSection") -> float:
    """alpha / rank, by which a b is multiplied; 1 where there are no adapters."""
    return train.lora_alpha / train.lora_rank if train.mode == "lora" else 1.0


def split(
    train: "TrainSection", params: Any, dtype: str, lora_tree: Any = None, copy: bool = True
) -> tuple[dict[str, Any], Any]:
    """(trainable, frozen) of a parameter tree.

    Args:
      dtype: of the frozen weights.
      lora_tree: the adapters; empty where the mode has none.
      copy: masters are never the arrays of `params`, which may then be used on.
    """

    def chosen(path: tuple[Any, ...], x: Array) -> bool:
        return is_trained(train, tree_path(path))

    mask = jax.tree_util.tree_map_with_path(chosen, params)
    masters = _keep(params, mask, True, lambda x: _cast(x, jnp.float32, copy))
    frozen = _keep(params, mask, False, lambda x: _cast(x, jnp.dtype(dtype)))
    return {"lora": lora_tree or {}, "params": masters}, frozen


def _cast(x: Any, dtype: Any, copy: bool = False) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    # Masters are donated step after step, so they must not be the caller's own arrays.
    return jnp.array(x, dtype, copy=copy)


def _keep(node: Any, mask: Any, wanted: bool, convert: Any) -> Any:
    """The part of a nested dictionary whose mask is `wanted`; no empty branches."""
    out = {}
    for name, below in node.items():
        if isinstance(below, dict):
            part = _keep(below, mask[name], wanted, convert)
            if part:
                out[name] = part
        elif mask[name] is wanted:
            out[name] = convert(below)
    return out


def overlay(below: Any, above: Any) -> Any:
    """The union of two nested dictionaries; leaves of `above` win."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    out = dict(below)
    for name, node in above.items():
        out[name] = overlay(below[name], node) if name in below else node
    return out


def abstract_split(config: LlamaConfig, train: "TrainSection", dtype: str) -> tuple[Any, Any]:
    """`split` in shapes: nothing is computed or allocated."""
    adapters = None
    if train.mode == "lora":
        adapters = lora.abstract_lora(config, train.lora_targets, train.lora_rank)
    return split(train, abstract_params(config, dtype), dtype, adapters)


def fresh_adapters(
    config: LlamaConfig, train: "TrainSection", seed: int, mesh: Mesh | None = None
) -> Any:
    """Adapters to start from; None where the mode has none."""
    if train.mode != "lora":
        return None
    return lora.init_lora(config, train.lora_targets, train.lora_rank, seed, mesh)


def variables(model: Any, trainable: Any, frozen: Any, maps: Any, scale: float) -> dict[str, Any]:
    """The variables of `model.apply`: masters cast to the model's dtype, laid over the frozen.

    A trained embedding stays float32 (the model casts what it looks up), so that the gradients of
    a token that occurs often add up in float32.

    Args:
      maps: of `freqkv_jax.maps`. scale: of `lora_scale`.
    """
    dtype = jnp.dtype(model.dtype)

    def leaf(path: tuple[Any, ...], x: Array) -> Array:
        return x if tree_path(path).endswith("embedding") else x.astype(dtype)

    params = overlay(frozen, jax.tree_util.tree_map_with_path(leaf, trainable["params"]))
    out = {"params": params, "maps": maps}
    if trainable["lora"]:
        out["lora"] = lora.collection(trainable["lora"], scale, dtype)
    return out


def merge(trainable: Any, frozen: Any, scale: float, dtype: str | None = None) -> Any:
    """The whole parameter tree with everything trained in it.

    Args:
      scale: of `lora_scale`.
      dtype: of every weight; None leaves the frozen ones (merged with adapters) as they are and
        the trained ones float32.
    """
    params = lora.merge_lora(overlay(frozen, trainable["params"]), trainable["lora"], scale)
    if dtype is None:
        return params
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
