"""A ladder of comparisons with transformers' Llama (torch, CPU, float32, eager attention)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig as TorchConfig
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import FullConfig
from freqkv_jax.model.layers import RMSNorm
from freqkv_jax.model.llama import Block, Llama
from freqkv_jax.model.self_attention import Attention
from freqkv_jax.rope import Rope
from tests.hf_names import to_params
from tests.tiny import random_tokens
from tests.tolerances import (
    BF16_PRIMITIVE_REL_L2,
    GRAD_REL_L2,
    LOGITS,
    LOSS,
    PRIMITIVE,
    assert_close,
    rel_l2,
)

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
HIDDEN = 36  # transformers wants a multiple of the heads
# (heads, kv heads, rope, tied): groups of 1, 2, 3 and 4.
CASES = [
    (4, 4, "default", False),
    (4, 2, "linear", True),
    (6, 2, "llama3", False),
    (4, 1, "llama3", True),
    (4, 4, "linear", False),
    (4, 2, "default", True),
]


def torch_config(heads=4, kv_heads=2, rope="default", tied=False) -> TorchConfig:
    return TorchConfig(
        vocab_size=61,
        hidden_size=HIDDEN,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_parameters=dict(ROPES[rope]),
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        attn_implementation="eager",
    )


def build(*case):
    """transformers' model with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(torch_config(*case)).float().eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
            else:
                gain = 1.5 if ".q_proj." in name or ".k_proj." in name else 1.0
                weight.normal_(0, gain / HIDDEN**0.5)
    config = LlamaConfig.from_hf(theirs.config.to_dict())
    ours = Llama(config, FullConfig())
    return theirs, ours, tree(ours, dict(theirs.named_parameters()))


def tree(ours, tensors):
    return to_params({k: t.detach().numpy() for k, t in tensors.items()}, ours.config)


def hidden_states(batch=2, length=50) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(batch, length, HIDDEN)).astype(np.float32)


def torch_inputs(theirs, x):
    """x, and what transformers' layers want beside it: (cos, sin) and a causal mask to add."""
    x, length = torch.tensor(x), x.shape[1]
    positions = theirs.model.rotary_emb(x, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    return x, {"position_embeddings": positions, "attention_mask": mask}


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm(eps):
    rng = np.random.default_rng(0)
    x = hidden_states() * np.array([1e-2, 3], np.float32)[:, None, None]
    scale = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
    theirs = modeling_llama.LlamaRMSNorm(HIDDEN, eps=eps)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        want = theirs(torch.tensor(x))
    got = RMSNorm(eps, "float32").apply({"params": {"scale": scale}}, x)
    assert_close(got, want, PRIMITIVE)


def test_rms_norm_in_bfloat16_rounds_where_theirs_does():
    x, scale = hidden_states(), np.random.default_rng(0).uniform(0.5, 1.5, HIDDEN)
    theirs = modeling_llama.LlamaRMSNorm(HIDDEN, eps=1e-5).bfloat16()
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        want = theirs(torch.tensor(x).bfloat16()).float()
    params = {"scale": jnp.asarray(scale, jnp.bfloat16)}
    got = RMSNorm(1e-5, "bfloat16").apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert rel_l2(got, want) <= BF16_PRIMITIVE_REL_L2 / 8  # rounding once more would be over it


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case):
    theirs, ours, params = build(*case)
    x, more = torch_inputs(theirs, hidden_states())
    want, _ = theirs.model.layers[1].self_attn(x, **more)
    layer = Attention(ours.config, ours.kv, "float32", "auto")
    got = layer.apply(
        {"params": params["layers_1"]["attention"]}, x.numpy(), ours.rope, {}, x.shape[1]
    )
    assert_close(got, want.detach(), PRIMITIVE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_block(case):
    theirs, ours, params = build(*case)
    x, more = torch_inputs(theirs, hidden_states())
    want = theirs.model.layers[1](x, **more)
    layer = Block(ours.config, ours.kv, "float32", "auto")
    got = layer.apply({"params": params["layers_1"]}, x.numpy(), ours.rope, {}, x.shape[1])
    assert_close(got, want.detach(), PRIMITIVE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_loss_and_gradients(case):
    theirs, ours, params = build(*case)
    tokens = random_tokens(ours.config, 2, 90)
    ids = torch.tensor(tokens).long()
    out = theirs(ids, labels=ids)
    out.loss.backward()

    def loss_and_logits(params):
        logits = ours.apply({"params": params}, tokens)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        loss = -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()
        return loss, logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))(params)
    assert_close(logits, out.logits.detach(), LOGITS)
    assert_close(loss, out.loss.item(), LOSS)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    want = tree(ours, {name: weight.grad for name, weight in theirs.named_parameters()})
    for (path, got), expected in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want), strict=True
    ):
        error = rel_l2(got, expected)
        assert error <= GRAD_REL_L2, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_rope(rope, head_dim):
    config = torch_config(rope=rope)
    config.head_dim = head_dim
    table = modeling_llama.LlamaRotaryEmbedding(config)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 200, 3, head_dim)).astype(np.float32)
    positions = np.arange(200)
    cos, sin = table(torch.tensor(x), torch.tensor(positions)[None])
    want, _ = modeling_llama.apply_rotary_pos_emb(
        torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2
    )
    ours = Rope(LlamaConfig.from_hf(config.to_dict()).rope, head_dim)
    assert_close(ours.rotate_tokens(jnp.asarray(x), jnp.asarray(positions)), want, PRIMITIVE)
    # Frequencies to the last bit (one unit, as torch's power differs by machine): angles at
    # positions in the thousands follow.
    np.testing.assert_array_max_ulp(ours.frequencies, table.inv_freq.numpy(), maxulp=1)
