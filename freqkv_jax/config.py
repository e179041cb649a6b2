"""The shape of a Llama model: a frozen config, read from and written to config.json."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

# Architectures whose computation is exactly Llama's (the keys are config.json's "architectures").
SAME_COMPUTATION = ("LlamaForCausalLM", "MistralForCausalLM")
# What each frequency scaling must say beside its type.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta` and how its frequencies are scaled (`rope_type`).

    Raises ValueError for an unknown type, a field that it needs and lacks, or a bad value.
    """

    theta: float
    rope_type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_FIELDS:
            raise ValueError(
                f"rope_type {self.rope_type!r} is not supported; allowed: {', '.join(ROPE_FIELDS)}."
                " Use a checkpoint with one of these, or convert it with its own tools first"
            )
        missing = [f for f in ROPE_FIELDS[self.rope_type] if getattr(self, f) is None]
        if missing:
            raise ValueError(
                f"rope_type {self.rope_type!r} needs {', '.join(missing)}, which the config lacks;"
                " add it to rope_scaling (or rope_parameters) in config.json"
            )
        for field in ("theta", *ROPE_FIELDS[self.rope_type]):
            value = getattr(self, field)
            if not 0 < value < math.inf:
                raise ValueError(f"rope {field} must be positive, got {value}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"rope low_freq_factor must be below high_freq_factor, got {low} and {high}"
            )

    def scaling_dict(self) -> dict[str, Any]:
        """The fields beside theta, under Hugging Face's names."""
        fields = ROPE_FIELDS[self.rope_type]
        return {"rope_type": self.rope_type} | {f: getattr(self, f) for f in fields}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one Llama model. Hashable, so that it can be a static argument.

    Nothing that changes the computation has a default (a default would silently win over a
    checkpoint). Raises ValueError where the sizes contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    architecture: str = "LlamaForCausalLM"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_position_embeddings",
        )  # fmt: skip
        for name in sizes:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_heads} must be a multiple of num_key_value_heads"
                f" {self.num_kv_heads}"
            )
        if not 0 <= self.rms_norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps must be 0 or positive, got {self.rms_norm_eps}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-text token ids, none if the model names none."""
        if self.eos_token_id is None:
            return ()
        ids = self.eos_token_id
        return (ids,) if isinstance(ids, int) else ids

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take in bfloat16, over all layers."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_params(self) -> int:
        """Number of weights, counted from the shapes."""
        e, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        attention = e * d * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * e * f + 2 * e
        embeddings = self.vocab_size * e * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + e

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "LlamaConfig":
        """Reads config.json's dictionary, in the spelling of transformers 4 or 5.

        Raises:
          ValueError: unknown architecture or rope type, a feature that this model does not
            compute (bias, sliding window, another activation), or a missing field.
        """
        names = raw.get("architectures") or []
        known = [name for name in names if name in SAME_COMPUTATION]
        if not known:
            raise ValueError(
                f"architecture {names[0] if names else raw.get('model_type')!r} is not supported;"
                f" allowed: {', '.join(SAME_COMPUTATION)} (models that compute exactly as Llama)"
            )
        _refuse_other_computation(raw)
        missing = [
            key
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                        "num_attention_heads", "rms_norm_eps", "max_position_embeddings")
            if raw.get(key) is None
        ]  # fmt: skip
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        eos = raw.get("eos_token_id")
        heads = raw["num_attention_heads"]
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope=_rope_from_hf(raw),
            max_position_embeddings=raw["max_position_embeddings"],
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            architecture=known[0],
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json's dictionary, readable by transformers 4 and 5."""
        eos = self.eos_token_id
        scaling = self.rope.scaling_dict()
        return {
            "architectures": [self.architecture],
            "model_type": "mistral" if self.architecture.startswith("Mistral") else "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,  # transformers 4; 5 reads rope_parameters
            "rope_scaling": None if self.rope.rope_type == "default" else scaling,
            "rope_parameters": {"rope_theta": self.rope.theta} | scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "sliding_window": None,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        }


def _refuse_other_computation(raw: dict[str, Any]) -> None:
    refused = []
    if raw.get("attention_bias"):
        refused.append("attention_bias=true")
    if raw.get("mlp_bias"):
        refused.append("mlp_bias=true")
    if raw.get("sliding_window") is not None and raw.get("use_sliding_window", True):
        refused.append(f"sliding_window={raw['sliding_window']} (allowed: null)")
    if raw.get("hidden_act", "silu") != "silu":
        refused.append(f"hidden_act={raw['hidden_act']!r} (allowed: 'silu')")
    if refused:
        raise ValueError(f"config.json asks for what this model does not compute: {refused}")


def _rope_from_hf(raw: dict[str, Any]) -> RopeConfig:
    # transformers 5 keeps everything in rope_parameters; 4 has rope_theta and rope_scaling.
    params = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = params.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ValueError("config.json has no rope_theta (nor rope_parameters.rope_theta)")
    rope_type = params.get("rope_type", params.get("type", "default"))
    known = ROPE_FIELDS.get(rope_type, ())
    return RopeConfig(float(theta), rope_type, **{f: params.get(f) for f in known})


def _shape(**sizes: Any) -> LlamaConfig:
    common: dict[str, Any] = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1}
    merged: dict[str, Any] = common | {"eos_token_id": 2} | sizes
    return LlamaConfig(**merged)


# Shapes by name, for compiling and benchmarking with random weights.
SHAPES = {
    "tiny": _shape(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, rope=RopeConfig(1e4), max_position_embeddings=512,
    ),
    "smollm2-135m": _shape(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, rope=RopeConfig(1e5), max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "llama2-7b": _shape(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=128, rope=RopeConfig(1e4), max_position_embeddings=4096,
    ),
    "llama2-13b": _shape(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40,
        num_kv_heads=40, head_dim=128, rope=RopeConfig(1e4), max_position_embeddings=4096,
    ),
    "llama3-8b": _shape(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, rope=RopeConfig(5e5), max_position_embeddings=8192,
        bos_token_id=128000, eos_token_id=128001,
    ),
}  # fmt: skip


def shape_named(name: str, **changes: Any) -> LlamaConfig:
    """The LlamaConfig of a shape in SHAPES, with fields changed; ValueError if unknown."""
    if name not in SHAPES:
        raise ValueError(f"no shape is named {name!r}; allowed: {', '.join(SHAPES)}")
    return dataclasses.replace(SHAPES[name], **changes)
