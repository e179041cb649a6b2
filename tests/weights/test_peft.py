"""PEFT adapters: what is written loads in peft, and what peft writes is read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from freqkv_jax.kv import FreqKVConfig, FullConfig, SinkWindowConfig
from freqkv_jax.model.llama import Llama
from freqkv_jax.model.lora import init_lora
from freqkv_jax.training.trainable import lora_scale, merge, split
from freqkv_jax.weights import load_pretrained, read_config, save_adapter
from freqkv_jax.weights.peft import CONFIG, WEIGHTS, read_adapter
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import LOGITS, assert_close
from tests.training.runs import run_config
from tests.weights.files import hf_tensors, write_hf

FULL = FullConfig()


def changed(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32), tree
    )


def parts(config, section=None):
    """What was trained, and what was not."""
    section = section or run_config(lora_rank=4, lora_targets=["q"]).train
    adapters = init_lora(config, section.lora_targets, 4)
    trainable, frozen = split(section, random_params(config), "float32", adapters)
    return changed(trainable, 1), frozen


def trained(tmp_path, tied=True, **train):
    """(base directory, adapter directory, model, merged parameters, config) of a made-up run."""
    config = tiny_config(tie_word_embeddings=tied)
    base = write_hf(tmp_path / "base", config, hf_tensors(random_params(config), config))
    section = run_config(lora_rank=4, lora_targets=["q", "v", "down"], **train).train
    trainable, frozen = parts(config, section)
    model = Llama(config, FULL)
    folder = tmp_path / "adapter"
    save_adapter(model, trainable, frozen, folder, 4, section.lora_alpha, str(base))
    return base, folder, model, merge(trainable, frozen, lora_scale(section)), config


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("tied, embeddings", [(True, True), (True, False), (False, True)])
def test_peft_gives_the_merged_logits(tmp_path, tied, embeddings):
    from peft import PeftModel

    base, folder, model, merged, config = trained(tmp_path, tied, train_embeddings=embeddings)
    tokens = random_tokens(config, 2, 20)
    want = jax.jit(model.apply)({"params": merged}, tokens)
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = torch_logits(plain, tokens)
    theirs = PeftModel.from_pretrained(plain, folder)
    assert np.abs(before - np.asarray(want)).max() > 0.1
    assert_close(torch_logits(theirs, tokens), want, LOGITS)
    # The way back in, from our own directory and from one that peft wrote.
    theirs.save_pretrained(tmp_path / "again")
    for source in (folder, tmp_path / "again"):
        _, got = load_pretrained(base, FULL, "float32", adapter=source)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, merged)


def test_the_policy_is_remembered(tmp_path):
    """The adapter's before the base's, and what is asked for before both."""
    base, folder, model, *_ = trained(tmp_path)
    kv = SinkWindowConfig(cache_size=32)
    save_adapter(model.clone(kv=kv), *parts(model.config), folder, 4, 8.0)
    assert read_config(base, folder)[1] == kv and read_config(base)[1] is None
    assert load_pretrained(base, adapter=folder)[0].kv == kv
    assert load_pretrained(base, FULL, adapter=folder)[0].kv == FULL
    stored = load_file(folder / WEIGHTS)
    save_file(stored, folder / WEIGHTS)  # as peft writes it
    assert load_pretrained(base, adapter=folder)[0].kv == FreqKVConfig()


def test_names_and_metadata(tmp_path):
    _, folder, *_ = trained(tmp_path)
    about = json.loads((folder / CONFIG).read_text())
    assert about["r"] == 4 and about["lora_alpha"] == 16 and about["ensure_weight_tying"]
    assert about["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    norms = ["embed_tokens", "input_layernorm", "norm", "post_attention_layernorm"]
    assert about["modules_to_save"] == norms
    tensors = load_file(folder / WEIGHTS)
    at = "base_model.model.model.layers.1"
    assert tensors[f"{at}.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{at}.mlp.down_proj.lora_B.weight"].shape == (32, 4)
    assert f"{at}.input_layernorm.weight" in tensors
    embedding = tensors["base_model.model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding, tensors["base_model.model.lm_head.weight"])


def test_another_base_is_refused(tmp_path):
    base, folder, model, _, config = trained(tmp_path)
    params = random_params(config, seed=5)
    other = write_hf(tmp_path / "other", config, hf_tensors(params, config))
    with pytest.raises(ValueError, match="trained on another base: its weights differ by"):
        load_pretrained(other, FULL, "float32", adapter=folder)
    load_pretrained(base, FULL, "bfloat16", adapter=folder)  # rounded, but the same
    wide = tiny_config(hidden_size=40, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"another base.* is \[4, 32\].*|the base needs"):
        read_adapter(folder, wide)
    with pytest.raises(ValueError, match="the base has no such module"):
        read_adapter(folder, tiny_config(num_layers=1, tie_word_embeddings=True))


def test_damaged_adapters(tmp_path):
    base, folder, _, _, config = trained(tmp_path)

    def copy(name):
        return shutil.copytree(folder, tmp_path / name)

    def with_config(name, **fields):
        where = copy(name)
        about = json.loads((where / CONFIG).read_text()) | fields
        (where / CONFIG).write_text(json.dumps(about))
        return where

    with pytest.raises(ValueError, match="use_dora"):
        read_adapter(with_config("dora", use_dora=True), config)
    with pytest.raises(ValueError, match="peft_type 'IA3' is not read"):
        read_adapter(with_config("ia3", peft_type="IA3"), config)
    with pytest.raises(ValueError, match="need r >= 1"):
        read_adapter(with_config("rank", r=None), config)
    assert read_adapter(with_config("rs", use_rslora=True), config).scale == 8.0
    with pytest.raises(FileNotFoundError, match="not a PEFT adapter directory"):
        read_adapter(base, config)
    cut = copy("cut")
    (cut / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        read_adapter(cut, config)
    half = copy("half")
    tensors = load_file(folder / WEIGHTS)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, half / WEIGHTS)
    with pytest.raises(ValueError, match="layers_0/attention/q: lora_A or lora_B is missing"):
        read_adapter(half, config)


def test_whole_weights_are_no_adapter(tmp_path):
    model = Llama(tiny_config(), FULL)
    trainable, frozen = split(
        run_config(mode="norms").train, random_params(model.config), "float32"
    )
    with pytest.raises(ValueError, match="save the merged model"):
        save_adapter(model, trainable, frozen, tmp_path / "a", 4, 8.0)
