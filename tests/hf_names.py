"""Hugging Face tensor names to the parameter tree, for tests (the library has its own table)."""

import numpy as np


def to_params(tensors, config) -> dict:
    """{name: array, [out, in]} -> the parameter tree of the library, kernels [in, out]."""

    def kernel(name):
        return {"kernel": np.asarray(tensors[f"{name}.weight"]).T}

    def scale(name):
        return {"scale": np.asarray(tensors[f"{name}.weight"])}

    params = {
        "embed": {"embedding": np.asarray(tensors["model.embed_tokens.weight"])},
        "norm": scale("model.norm"),
    }
    for i in range(config.num_layers):
        at = f"model.layers.{i}"
        params[f"layers_{i}"] = {
            "input_norm": scale(f"{at}.input_layernorm"),
            "attention": {p: kernel(f"{at}.self_attn.{p}_proj") for p in "qkvo"},
            "post_norm": scale(f"{at}.post_attention_layernorm"),
            "mlp": {p: kernel(f"{at}.mlp.{p}_proj") for p in ("gate", "up", "down")},
        }
    if not config.tie_word_embeddings:
        params["lm_head"] = kernel("lm_head")
    return params
