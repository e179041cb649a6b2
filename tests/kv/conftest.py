"""What tests of kernels share."""

import pytest

from freqkv_jax import nvidia


@pytest.fixture
def interpreted(monkeypatch):
    """Triton kernels run on a CPU."""
    monkeypatch.setattr(nvidia, "INTERPRET", True)
