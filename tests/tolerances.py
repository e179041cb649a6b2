"""The only home of tolerances. Loosening one needs a written reason in the commit.

Use: `from tests.tolerances import LOGITS`.
"""

import numpy as np

# float32. Absolute unless the name says REL_L2 (relative L2 over a whole array).
COMPRESS = 1e-5
PRIMITIVE = 1e-5  # RMSNorm, rotary embedding, attention of unit-size inputs
LOGITS = 2e-4  # golden and tiny models: |logit| <= 7, T <= 300
LOSS = 1e-5
GRAD_REL_L2 = 1e-4  # a tensor
REAL_REL_L2 = 1e-5  # real models, T <= 4096, over all logits; and the same greedy tokens
SHARDED_LOSS = 2e-4  # every loss of a run on a mesh against one device
# bfloat16
BF16_REL_L2 = 0.05  # over all logits
BF16_PRIMITIVE_REL_L2 = 0.008  # one norm, attention or compress: two units in the last place
BF16_LOSS = 0.02  # every loss of a run in bfloat16 against float32, relative
# Writing weights or a state and reading them back changes nothing.
ROUNDTRIP = 0.0
# float64 programs against each other.
FLOAT64 = 1e-10


def rel_l2(got, want) -> float:
    """|got - want| / |want| in the L2 norm over the whole arrays, reckoned in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shapes differ: {got.shape} and {want.shape}"
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def assert_close(got, want, atol: float) -> None:
    """Every entry of `got` is within `atol` (absolute) of `want`; shapes must agree."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shapes differ: {got.shape} and {want.shape}"
    np.testing.assert_allclose(got, want, rtol=0.0, atol=atol)
