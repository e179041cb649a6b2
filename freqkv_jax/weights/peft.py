"""PEFT adapter directories: adapter_config.json and adapter_model.safetensors, both ways."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from freqkv_jax.config import LlamaConfig
from freqkv_jax.files import write_whole
from freqkv_jax.kv import KVPolicy, policy_from_dict, policy_to_dict
from freqkv_jax.model.llama import Llama
from freqkv_jax.model.lora import TARGETS, abstract_lora, merge_lora
from freqkv_jax.sharding import gather, tree_path, wait_for_all
from freqkv_jax.weights.hf import POLICY_KEY, read_json
from freqkv_jax.weights.table import Target, nest, targets

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING = "embed/embedding"
# Keys in the weights' metadata, since peft warns of any that its config does not have: the policy
# (POLICY_KEY), and a sample of the weights that the adapter was trained on.
BASE_SAMPLE = "freqkv_jax_base"
SAMPLE = 8  # rows and columns of a sampled kernel
# Relative distance of two samples: bfloat16 rounds by 0.002, another training moves more.
SAME_BASE = 0.01
# What would change the computation and is not read here, with the value that is harmless.
REFUSED = {
    "use_dora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "lora_bias": False,
    "use_qalora": False,
}


@dataclass(frozen=True)
class Adapter:
    """An adapter as read: adapter tree, trained parameters, scale (alpha / rank), base's sample."""

    lora: Any
    params: Any
    scale: float
    sample: dict[str, list[float]] | None


def save_adapter(
    model: Llama,
    trainable: Any,
    frozen: Any,
    path: str | os.PathLike[str],
    rank: int,
    alpha: float,
    base: str | None = None,
) -> None:
    """Writes an adapter that peft and `load_pretrained(..., adapter=path)` read, with the model's
    policy.

    Args:
      trainable: {"lora": adapter tree, "params": trained parameters}, stored float32.
      frozen: the weights that were not trained; a sample of them tells the base again.
      base: name or path of the base model, for people and peft.

    Raises:
      ValueError: there are no adapters (save the merged model instead).
      OSError: the directory cannot be written.
    """
    if not trainable["lora"]:
        raise ValueError(
            "nothing but whole weights was trained, which peft's LoRA files cannot hold; save the"
            " merged model with save_pretrained instead"
        )
    names = _stored_names(model.config)
    tensors = {}
    for where, leaf in _leaves(trainable["lora"]).items():
        kernel, _, side = where.rpartition("/")
        name = names[f"{kernel}/kernel"].name.removesuffix(".weight")
        tensors[f"{PREFIX}{name}.lora_{side.upper()}.weight"] = _float32(leaf).T
    whole = _leaves(trainable["params"])
    for where, leaf in whole.items():
        target, stored = names[where], _float32(leaf)
        tensors[PREFIX + target.name] = stored.T if target.transposed else stored
    if model.config.tie_word_embeddings and EMBEDDING in whole:
        # peft stores the head that follows the embedding, and asks for it when it loads.
        tensors[f"{PREFIX}lm_head.weight"] = tensors[PREFIX + names[EMBEDDING].name]
    sample = base_sample(frozen)
    if jax.process_index() == 0:
        config = _config_json(model.config, trainable["lora"], list(whole), rank, alpha, base)
        about = {
            POLICY_KEY: json.dumps(policy_to_dict(model.kv)),
            BASE_SAMPLE: json.dumps(sample),
        }
        _write(Path(path).expanduser(), tensors, config, about)
    wait_for_all("save_adapter")


def _write(
    folder: Path, tensors: dict[str, np.ndarray], config: Any, about: dict[str, str]
) -> None:
    from safetensors.numpy import save_file

    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a directory to write the adapter into")
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    metadata = {"format": "pt", **about}
    # Without its config the folder is no adapter, so it goes first and comes last.
    (folder / CONFIG).unlink(missing_ok=True)
    write_whole(folder / WEIGHTS, lambda name: save_file(tensors, name, metadata=metadata))
    text = json.dumps(config, indent=2) + "\n"
    write_whole(folder / CONFIG, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _config_json(
    config: LlamaConfig, lora: Any, whole: Sequence[str], rank: int, alpha: float, base: str | None
) -> dict[str, Any]:
    layer = lora["layers_0"]
    adapted = [name for name, (part, leaf) in TARGETS.items() if leaf in layer.get(part, {})]
    names = _stored_names(config)
    # By the module's last name, which stands for all layers; norms are always trained together.
    modules = {names[path].name.removesuffix(".weight").rpartition(".")[2] for path in whole}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [f"{name}_proj" for name in adapted],
        "modules_to_save": sorted(modules) or None,
        # peft then lets the head of a tied model follow the trained embedding.
        "ensure_weight_tying": config.tie_word_embeddings and "embed_tokens" in modules,
    }


def remembered_policy(path: str | os.PathLike[str]) -> KVPolicy | None:
    """The cache policy that an adapter was trained with; None if it does not say.

    Raises:
      FileNotFoundError: the directory or its weights are missing. ValueError: they are damaged.
    """
    text = _opened(Path(path).expanduser(), lambda file: file.metadata() or {}).get(POLICY_KEY)
    return None if text is None else policy_from_dict(json.loads(text))


def _opened(folder: Path, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of an adapter's weights."""
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: it is not a PEFT adapter directory")
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            return read(file)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated or corrupted: {error}") from error


def read_adapter(path: str | os.PathLike[str], config: LlamaConfig) -> Adapter:
    """Reads an adapter directory for a base of this shape.

    Raises:
      FileNotFoundError: the directory or a file of it is missing.
      ValueError: damaged files, a kind of adapter that is not LoRA as read here, or tensors that
        are not those of the base (all listed).
    """

    def read(file: Any) -> Any:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}

    folder = Path(path).expanduser()
    stored, metadata = _opened(folder, read)
    rank, scale = _check_config(read_json(folder / CONFIG), folder / CONFIG)
    lora, params = _sort(stored, config, rank, folder)
    sample = metadata.get(BASE_SAMPLE)
    return Adapter(lora, params, scale, None if sample is None else json.loads(sample))


def _check_config(about: dict[str, Any], path: Path) -> tuple[int, float]:
    if about.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {about.get('peft_type')!r} is not read; only LORA is")
    wrong = {
        key: about[key]
        for key, harmless in REFUSED.items()
        if about.get(key) and about[key] != harmless
    }
    if wrong:
        raise ValueError(
            f"{path} asks for what is not read here: {wrong}. Merge the adapter with peft"
            " (merge_and_unload) and load the merged model"
        )
    rank, alpha = about.get("r"), about.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(f"{path}: need r >= 1 and lora_alpha, got r={rank!r}, {alpha!r}")
    return rank, alpha / (rank**0.5 if about.get("use_rslora") else rank)


def _sort(
    stored: dict[str, np.ndarray], config: LlamaConfig, rank: int, folder: Path
) -> tuple[Any, Any]:
    """(adapter tree, trained parameters) of the file's tensors."""
    lora_shapes = _leaves(abstract_lora(config, list(TARGETS), rank))
    by_name = {t.name.removesuffix(".weight"): t for t in _stored_names(config).values()}
    lora, params, problems = {}, {}, []
    for name, array in stored.items():
        module = name.removeprefix(PREFIX).removesuffix(".weight")
        module, _, side = module.partition(".lora_")
        # peft stores the head of a tied model beside the embedding that it equals.
        if module == "lm_head" and not side and config.tie_word_embeddings:
            module = "model.embed_tokens"
            if f"{PREFIX}{module}.weight" in stored:
                array = _same_head(array, stored[f"{PREFIX}{module}.weight"], folder)
        target = by_name.get(module)
        where = None if target is None else target.path.removesuffix("/kernel")
        if side:
            where = f"{where}/{side.lower()}"
            wanted = lora_shapes.get(where)
            shape, found, array = getattr(wanted, "shape", None), lora, array.T
        else:
            where = None if target is None else target.path
            shape, found = getattr(target, "shape", None), params
            array = array.T if target is not None and target.transposed else array
        if where is None or shape is None:
            problems.append(f"{name} (the base has no such module)")
        elif array.shape != shape:
            problems.append(f"{name} is {list(array.shape)}, the base needs {list(shape)}")
        else:
            found[where] = array
    halves = {name.rpartition("/")[0] for name in lora}
    problems += [f"{p}: lora_A or lora_B is missing" for p in halves
                 if f"{p}/a" not in lora or f"{p}/b" not in lora]  # fmt: skip
    if problems or not stored:
        listed = "; ".join(problems[:8]) + (" ..." if len(problems) > 8 else "")
        raise ValueError(
            f"{folder} is an adapter for another base, or damaged: {listed or 'it holds no tensor'}"
        )
    return nest(lora), nest(params)


def _same_head(head: np.ndarray, embedding: np.ndarray, folder: Path) -> np.ndarray:
    if not np.array_equal(head, embedding):
        raise ValueError(
            f"{folder} holds a head that differs from its embedding, but the base ties them; merge"
            " it with peft into a model that does not (tie_word_embeddings false)"
        )
    return embedding


def merge_adapter(path: str | os.PathLike[str], model: Llama, params: Any) -> Any:
    """`params` with the adapter of a directory merged in, in their dtype and placement.

    Raises:
      ValueError: the adapter is for another base, or damaged. OSError: it cannot be read.
    """
    adapter = read_adapter(path, model.config)
    _check_base(adapter, params, path)

    def laid_over(node: Any, trained: Any) -> Any:
        if not isinstance(node, dict):
            return jax.device_put(jnp.asarray(trained, node.dtype), node.sharding)
        return {k: laid_over(v, trained[k]) if k in trained else v for k, v in node.items()}

    return merge_lora(laid_over(params, adapter.params), adapter.lora, adapter.scale)


def _check_base(adapter: Adapter, params: Any, path: Any) -> None:
    """Compares the sample of the base with that of `params`; peft's own files have none."""
    if adapter.sample is None:
        return
    distance = samples_apart(adapter.sample, base_sample(params))
    if not distance <= SAME_BASE:
        raise ValueError(
            f"the adapter {path} was trained on another base: its weights differ by"
            f" {distance:.1%} from those of this model (allowed: {SAME_BASE:.0%}). Give the base"
            " named in its adapter_config.json, in the same quantisation"
        )


def samples_apart(was: dict[str, list[float]], now: dict[str, list[float]]) -> float:
    """Relative L2 distance of what `base_sample` gave; what is missing now counts as zeros."""
    before = np.concatenate([np.asarray(values) for values in was.values()])
    here = np.concatenate([np.asarray(now.get(name, np.zeros(len(x)))) for name, x in was.items()])
    return float(np.linalg.norm(here - before) / max(np.linalg.norm(before), 1e-30))


def base_sample(params: Any) -> dict[str, list[float]]:
    """Corners of the kernels of the first and the last layer, those that are adapted or frozen."""
    layers = [name for name in params if name.startswith("layers_")]
    layers = sorted(layers, key=lambda name: int(name.rpartition("_")[2]))
    sample = {}
    for name in dict.fromkeys((layers[0], layers[-1])):
        for where, leaf in _leaves(params[name]).items():
            if where.endswith("/kernel"):
                corner = _float32(leaf[:SAMPLE, :SAMPLE]).reshape(-1)
                sample[f"{name}/{where}"] = [round(float(x), 7) for x in corner]
    return sample


def _stored_names(config: LlamaConfig) -> dict[str, Target]:
    """Tree path -> target, under Hugging Face's names."""
    return {target.path: target for target in targets(config, "hf").values()}


def _leaves(tree: Any) -> dict[str, Any]:
    return {tree_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _float32(leaf: Any) -> np.ndarray:
    return gather(leaf).astype(np.float32)
