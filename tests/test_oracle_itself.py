"""The two oracles agree with each other, so that a mistake in one cannot hide in the tests."""

import numpy as np
import pytest
import torch

from tests import oracle, torch_oracle
from tests.oracle import OraclePolicy
from tests.tiny import random_params, random_tokens, tiny_config
from tests.tolerances import FLOAT64, assert_close

POLICIES = [
    OraclePolicy(None),
    OraclePolicy(16),
    OraclePolicy(17, 3),
    OraclePolicy(16, 2, 3, 0.37),
    OraclePolicy(12, 4, 0, 0.0),
    OraclePolicy(20, 1, 7, 0.8),
    OraclePolicy(1, 0, 0, 0.0),
    OraclePolicy(16, window=True),
    OraclePolicy(16, 2, 3, 0.37, window=True),
]


def float64(tree):
    if isinstance(tree, dict):
        return {key: float64(value) for key, value in tree.items()}
    return torch.tensor(np.asarray(tree, np.float64))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_oracles_agree(policy):
    config = tiny_config(6, 2)
    params, tokens = random_params(config), random_tokens(config, 2, 53)
    want = torch_oracle.logits(config, float64(params), policy, torch.tensor(tokens).long())
    assert_close(oracle.logits(config, params, policy, tokens), want.numpy(), FLOAT64)


def test_lengths_of_the_cache():
    # The design's example: N=64, S=4, g=.5 gives 1..64, 35..64, 35..64, ...
    config = tiny_config(num_layers=1)
    reader = oracle.Oracle(config, random_params(config), OraclePolicy(64))
    lengths = []
    for token in random_tokens(config, 1, 130)[0]:
        reader.step(token)
        lengths.append(reader.fill)
    assert lengths == [*range(1, 65), *range(35, 65), *range(35, 65), *range(35, 41)]
    assert reader.num_compressions == 3


@pytest.mark.parametrize("n, keep", [(60, 30), (7, 3), (11, 1), (5, 0), (6, 6)])
def test_low_pass_facts(n, keep):
    matrix = oracle.low_pass_matrix(n, keep)
    assert matrix.shape == (keep, n)
    assert_close(matrix.sum(axis=1), np.ones(keep), FLOAT64)
    assert_close(matrix[::-1, ::-1], matrix, FLOAT64)
    assert_close(matrix @ matrix.T, np.eye(keep) * keep / n, FLOAT64)
