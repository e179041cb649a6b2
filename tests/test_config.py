"""config.json in both spellings, what is refused and how, and the way back."""

import json

import pytest

from freqkv_jax.config import SHAPES, LlamaConfig, RopeConfig, shape_named
from tests.tiny import tiny_config

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# As transformers 4 writes it.
RAW = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 130000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 7],
}


def with_rope(spelling, rope):
    """RAW with a rope in the spelling of transformers 4 or 5."""
    raw = {key: value for key, value in RAW.items() if not key.startswith("rope_")}
    if spelling == 5:
        return raw | {"rope_parameters": {"rope_theta": 130000.0, **rope}}
    return raw | {"rope_theta": 130000.0, "rope_scaling": rope or None}


def test_fields():
    config = LlamaConfig.from_hf(RAW)
    assert config == LlamaConfig(
        61, 36, 44, 3, 6, 2, 6, 1e-6, RopeConfig(130000.0), 512, True,
        bos_token_id=1, eos_token_id=(2, 7),
    )  # fmt: skip
    assert config.eos_ids == (2, 7) and hash(config) == hash(LlamaConfig.from_hf(RAW))


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize(
    ("rope", "want"),
    [
        ({}, RopeConfig(130000.0)),
        ({"rope_type": "default"}, RopeConfig(130000.0)),
        ({"rope_type": "linear", "factor": 4.0}, RopeConfig(130000.0, "linear", 4.0)),
        ({"type": "linear", "factor": 4.0}, RopeConfig(130000.0, "linear", 4.0)),
        (LLAMA3_ROPE, RopeConfig(130000.0, "llama3", 8.0, 1.0, 4.0, 64)),
    ],
    ids=["none", "default", "linear", "old-type", "llama3"],
)
def test_rope_in_both_spellings(spelling, rope, want):
    assert LlamaConfig.from_hf(with_rope(spelling, rope)).rope == want


def test_defaults_of_the_format():
    raw = {k: v for k, v in RAW.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
    config = LlamaConfig.from_hf(raw)
    assert config.num_kv_heads == 6 and not config.tie_word_embeddings
    assert config.head_dim == 6
    assert LlamaConfig.from_hf(RAW | {"head_dim": 16}).head_dim == 16
    assert LlamaConfig.from_hf(RAW | {"eos_token_id": None}).eos_ids == ()
    assert LlamaConfig.from_hf(RAW | {"eos_token_id": 0}).eos_ids == (0,)


def test_mistral_without_a_window_is_a_llama():
    raw = RAW | {"architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert LlamaConfig.from_hf(raw).architecture == "MistralForCausalLM"
    assert LlamaConfig.from_hf(raw).to_hf()["model_type"] == "mistral"


REFUSED = [
    ({"architectures": ["Qwen3ForCausalLM"]}, "architecture 'Qwen3ForCausalLM' is not supported"),
    ({"architectures": ["GemmaForCausalLM"]}, "allowed: LlamaForCausalLM, MistralForCausalLM"),
    ({"architectures": None, "model_type": "gpt2"}, "architecture 'gpt2' is not supported"),
    ({"attention_bias": True}, "attention_bias=true"),
    ({"mlp_bias": True}, "mlp_bias=true"),
    ({"sliding_window": 4096}, r"sliding_window=4096 \(allowed: null\)"),
    ({"hidden_act": "gelu"}, r"hidden_act='gelu' \(allowed: 'silu'\)"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not supported"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "allowed: default, linear, llama3"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs factor"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    ({"rope_theta": None}, "has no rope_theta"),
    ({"rope_theta": -1.0}, "rope theta must be positive, got -1.0"),
    ({"rope_theta": float("nan")}, "rope theta must be positive, got nan"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope factor must be positive, got 0"),
    (
        {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 0.0}},
        "rope low_freq_factor must be positive, got 0.0",
    ),
    (
        {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 0}},
        "rope original_max_position_embeddings must be positive, got 0",
    ),
    (
        {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}},
        "rope low_freq_factor must be below high_freq_factor, got 4.0 and 4.0",
    ),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be 0 or positive, got -1e-05"),
    ({"vocab_size": None, "rms_norm_eps": None}, "config.json lacks vocab_size, rms_norm_eps"),
    ({"num_key_value_heads": 4}, "num_attention_heads 6 must be a multiple of .* 4"),
    ({"head_dim": 7}, "head_dim must be even for rotary embedding, got 7"),
    ({"num_hidden_layers": 0}, "num_layers must be a positive integer, got 0"),
    ({"hidden_size": "36", "head_dim": 6}, "hidden_size must be a positive integer, got '36'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(RAW | changes)


def test_all_that_is_refused_is_named_at_once():
    with pytest.raises(
        ValueError, match="attention_bias=true.*sliding_window=8.*hidden_act='gelu'"
    ):
        LlamaConfig.from_hf(
            RAW | {"attention_bias": True, "sliding_window": 8, "hidden_act": "gelu"}
        )


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 2.0}, LLAMA3_ROPE], ids=str)
def test_there_and_back(spelling, rope):
    config = LlamaConfig.from_hf(with_rope(spelling, rope))
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("rope", [{}, LLAMA3_ROPE], ids=["default", "llama3"])
def test_transformers_reads_what_is_written(rope):
    transformers = pytest.importorskip("transformers")
    config = LlamaConfig.from_hf(with_rope(4, rope))
    theirs = transformers.LlamaConfig(**config.to_hf())
    assert theirs.rope_parameters == {"rope_theta": 130000.0, "rope_type": "default"} | rope
    assert LlamaConfig.from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_shapes_have_the_published_number_of_weights(name, params):
    assert shape_named(name).num_params == params


def test_shapes_by_name():
    assert shape_named("tiny", num_layers=5).num_layers == 5
    assert SHAPES["llama2-7b"].kv_bytes_per_token * 4096 == 2**31
    with pytest.raises(ValueError, match="no shape is named 'llama9'; allowed: tiny, smollm2-135m"):
        shape_named("llama9")


def test_kv_heads_must_divide():
    with pytest.raises(ValueError, match="num_attention_heads 4 must be a multiple"):
        tiny_config(4, 3)
