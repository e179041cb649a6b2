"""What this device can do: copy bandwidth and matmul rate, measured in the run that uses them."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array

from freqkv_jax.bench.timing import MIN_REPEATS, measure_host
from freqkv_jax.model.layers import matmul


@dataclass(frozen=True)
class Sizes:
    """What is measured: elements copied, the side of the square matrices, and how many products
    and copies in a row are one call (so that the time to launch one hides behind the one before).
    """

    copy_elements: int
    matmul_side: int
    calls: int = 10


ACCELERATOR = Sizes(1 << 28, 8192)  # 1 GiB of float32
CPU = Sizes(1 << 26, 2048, calls=2)  # larger than its caches, and done in seconds


@dataclass(frozen=True)
class Ceilings:
    """Rates that the device reached: FLOP/s in `dtype` and bytes/s, reads and writes counted."""

    flops_per_s: float
    bytes_per_s: float
    dtype: str
    sizes: Sizes

    def floor(self, flops: float, num_bytes: float) -> tuple[float, str]:
        """The least seconds that the work takes, and which limit sets them."""
        compute, memory = flops / self.flops_per_s, num_bytes / self.bytes_per_s
        return (compute, "compute") if compute >= memory else (memory, "memory")


def measure_ceilings(
    dtype: str, sizes: Sizes | None = None, repeats: int = MIN_REPEATS
) -> Ceilings:
    """Measures both rates; the matrices hold random numbers (zeros may run faster)."""
    if sizes is None:
        sizes = CPU if jax.devices()[0].platform == "cpu" else ACCELERATOR
    copy = measure_host(copy_call(sizes.copy_elements, sizes.calls), repeats).median
    product = measure_host(matmul_call(sizes.matmul_side, dtype, sizes.calls), repeats).median
    return Ceilings(
        sizes.calls * 2 * sizes.matmul_side**3 / product,
        sizes.calls * 8 * sizes.copy_elements / copy,
        dtype,
        sizes,
    )


def copy_call(elements: int, calls: int) -> Callable[[int], Array]:
    """`calls` runs of x + 1 on float32, each on the result of the one before.

    Each run is a program of its own: of additions in one program the compiler makes one.
    """
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    box = [jax.random.normal(jax.random.key(0), (elements,))]

    def call(_: int) -> Array:
        for _ in range(calls):
            box[0] = add(box[0])
        return box[0]

    return call


def matmul_call(side: int, dtype: str, calls: int) -> Callable[[int], Array]:
    """`calls` matrix products, each on the result of the one before."""
    product = jax.jit(matmul)

    def normal(seed: int, scale: float) -> Array:
        return (jax.random.normal(jax.random.key(seed), (side, side)) * scale).astype(dtype)

    # So scaled, the products keep the size of their entries.
    left, right = normal(1, 1.0), normal(2, side**-0.5)

    def call(_: int) -> Array:
        x = left
        for _ in range(calls):
            x = product(x, right)
        return x

    return call
