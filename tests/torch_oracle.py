"""The same semantics in torch float64, a chunk at a time, for gradients by autograd.

It shares with `tests/oracle.py` the numbers of a policy and the rotary frequencies, not its
program: here a cache is a matrix product away from the one before it, there it is a list.
"""

import numpy as np
import torch

from tests.oracle import OraclePolicy, inverse_frequencies, low_pass_matrix


def step_matrix(policy: OraclePolicy) -> torch.Tensor:
    """A [P, N]: the cache after compression is A @ the full cache."""
    n, s, r, keep = policy.cache_size, policy.sink_size, policy.recent_size, policy.keep
    matrix = np.zeros((s + keep + r, n))
    matrix[:s, :s] = np.eye(s)
    matrix[s + keep :, n - r :] = np.eye(r)
    if policy.window:
        matrix[s : s + keep, n - r - keep : n - r] = np.eye(keep)
    else:
        matrix[s : s + keep, s : n - r] = low_pass_matrix(n - s - r, keep)
    return torch.tensor(matrix)


def rotate(x: torch.Tensor, start: int, freqs: torch.Tensor) -> torch.Tensor:
    """x [B, n, heads, D] at positions start, start + 1, ..."""
    angles = (start + torch.arange(x.shape[1], dtype=torch.float64))[:, None, None] * freqs
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q, k, v, freqs) -> torch.Tensor:
    """q [B, n, H, D], the last n of the m slots; k, v [B, m, K, D], unrotated -> [B, n, H, D]."""
    n, m = q.shape[1], k.shape[1]
    q, k = rotate(q, m - n, freqs), rotate(k, 0, freqs)
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    seen = torch.arange(m)[None, :] <= torch.arange(m - n, m)[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def attention(q, k, v, policy: OraclePolicy, freqs) -> torch.Tensor:
    """All tokens of one layer: the first N together, then chunk after chunk."""
    length = q.shape[1]
    done = min(length, policy.cache_size or length)
    cache_k, cache_v = k[:, :done], v[:, :done]
    outputs = [attend(q[:, :done], cache_k, cache_v, freqs)]
    matrix = None if done == length else step_matrix(policy)
    while done < length:
        prefix_k, prefix_v = (torch.einsum("pn,bnkd->bpkd", matrix, c) for c in (cache_k, cache_v))
        end = min(length, done + matrix.shape[1] - matrix.shape[0])
        cache_k = torch.cat([prefix_k, k[:, done:end]], dim=1)
        cache_v = torch.cat([prefix_v, v[:, done:end]], dim=1)
        outputs.append(attend(q[:, done:end], cache_k, cache_v, freqs))
        done = end
    return torch.cat(outputs, dim=1)


def rms_norm(x, scale, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


def logits(config, params, policy: OraclePolicy, tokens) -> torch.Tensor:
    """tokens [B, T] and the library's parameter tree, as torch tensors -> [B, T, V]."""
    freqs = torch.tensor(inverse_frequencies(config.rope, config.head_dim))
    eps, batch, length = config.rms_norm_eps, tokens.shape[0], tokens.shape[1]
    x = params["embed"]["embedding"][tokens]
    for i in range(config.num_layers):
        layer = params[f"layers_{i}"]
        y = rms_norm(x, layer["input_norm"]["scale"], eps)
        q, k, v = (
            (y @ layer["attention"][p]["kernel"]).reshape(batch, length, -1, config.head_dim)
            for p in "qkv"
        )
        mixed = attention(q, k, v, policy, freqs).reshape(batch, length, -1)
        x = x + mixed @ layer["attention"]["o"]["kernel"]
        y = rms_norm(x, layer["post_norm"]["scale"], eps)
        mlp = layer["mlp"]
        gate = torch.nn.functional.silu(y @ mlp["gate"]["kernel"])
        x = x + (gate * (y @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    x = rms_norm(x, params["norm"]["scale"], eps)
    tied = config.tie_word_embeddings
    return x @ (params["embed"]["embedding"].T if tied else params["lm_head"]["kernel"])


def loss_and_grads(config, params, policy: OraclePolicy, tokens) -> tuple[float, dict]:
    """Mean next-token loss and its gradient, a tree of NumPy arrays shaped like `params`."""
    leaves = []

    def leaf(node):
        if isinstance(node, dict):
            return {key: leaf(value) for key, value in node.items()}
        leaves.append(torch.tensor(np.asarray(node, np.float64), requires_grad=True))
        return leaves[-1]

    def grad(node):
        return (
            {key: grad(value) for key, value in node.items()}
            if isinstance(node, dict)
            else node.grad.numpy()
        )

    tree, tokens = leaf(params), torch.tensor(np.asarray(tokens, np.int64))
    out = logits(config, tree, policy, tokens)[:, :-1]
    loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.item(), grad(tree)
