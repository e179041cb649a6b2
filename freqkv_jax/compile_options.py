"""What XLA is told of single programs, where its defaults cost time; nothing global is set."""

from typing import Any

import jax
from jax.sharding import Mesh


def once_a_call(mesh: Mesh | None = None) -> dict[str, Any] | None:
    """`compiler_options` of `jax.jit` for programs of long kernels, each run once a call.

    On NVIDIA XLA makes CUDA graphs of their kernels, and sets in them anew where all arrays are
    at each call, while the device waits: 13 us a kernel, 20 ms of the 226 in which an H100 reads
    8188 tokens with the 7B shape. Kernels started one by one are started while others run. (A
    loop's body, as of decoding, is set once and run often: there graphs are worth it.)
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    # A graph of fewer kernels than this is not made.
    return {"xla_gpu_graph_min_graph_size": 1_000_000} if platform in ("gpu", "cuda") else None


def reading(mesh: Mesh | None = None) -> dict[str, Any] | None:
    """`once_a_call` for programs that read many tokens.

    Triton's matrix products lose to cuBLAS there, but while XLA tries them out it gives each one
    the norm's scale before it, and when cuBLAS wins scales in five copies, one a product: 30 ms of
    the 909 in which an H100 reads 32740 tokens with the 7B shape. Without them the norm scales
    once (865 ms), and compiling takes 62 s in place of 105.
    """
    options = once_a_call(mesh)
    return None if options is None else options | {"xla_gpu_enable_triton_gemm": False}
