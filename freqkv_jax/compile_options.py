"""What XLA is told of single programs, where its defaults cost time; nothing global is set."""

from typing import Any

import jax
from jax.sharding import Mesh


def many_tokens(mesh: Mesh | None = None) -> dict[str, Any] | None:
    """`compiler_options` of `jax.jit` for programs that read many tokens or train on them.

    Such programs are of long kernels, each run once a call. On NVIDIA XLA makes CUDA graphs of
    them, and sets in them anew where all arrays are at each call, while the device waits: 13 us a
    kernel, 20 ms of the 226 in which an H100 reads 8188 tokens with the 7B shape. Kernels started
    one by one are started while others run. (A loop's body, as of decoding, is set once and run
    often: there graphs are worth it.)

    Triton's matrix products lose to cuBLAS there, but while XLA tries them out it gives each one
    the norm's scale before it, and when cuBLAS wins scales in five copies, one a product: 30 ms of
    the 909 in which an H100 reads 32740 tokens with the 7B shape. Without them the norm scales
    once (865 ms), and compiling takes 62 s in place of 105. Forward and backward of one layer take
    17.1 ms for 18.2 at 8188 tokens on an H200, 74.7 for 76.6 at 32740.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform not in ("gpu", "cuda"):
        return None
    return {
        "xla_gpu_graph_min_graph_size": 1_000_000,  # a graph of fewer kernels is not made
        "xla_gpu_enable_triton_gemm": False,
    }
