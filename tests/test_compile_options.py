"""Options are for the platform that needs them, and every platform's compiler takes them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from freqkv_jax.compile_options import many_tokens


def mesh_on(platform):
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))


def test_elsewhere_nothing_is_set():
    assert many_tokens() is None and many_tokens(mesh_on("tpu")) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_no_graphs_on_nvidia_and_no_products_by_triton(platform, monkeypatch):
    options = many_tokens(mesh_on(platform))  # type: ignore[arg-type]
    assert options == {
        "xla_gpu_graph_min_graph_size": 1_000_000,
        "xla_gpu_enable_triton_gemm": False,
    }
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert many_tokens() == options
    # XLA knows the names here too, and refuses others.
    assert jax.jit(lambda x: x + 1, compiler_options=many_tokens())(1.0) == 2.0
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no_such_option": 1})(1.0)
