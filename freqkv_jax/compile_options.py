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
