"""Rotary angles are transformers' to the last digit: at 2900 positions one digit is 2e-4."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trio_deploy.families.base import RopeConfig
from trio_deploy.graphs.rope import inverse_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("scaling", ["default", "linear", "llama3"])
def test_frequencies_are_those_of_transformers(head_dim, theta, scaling):
    raw = {"rope_type": scaling, "rope_theta": theta}
    ours = RopeConfig(theta, scaling)
    if scaling == "linear":
        raw["factor"], ours = 2.5, RopeConfig(theta, scaling, 2.5)
    if scaling == "llama3":
        raw |= LLAMA3 | {"original_max_position_embeddings": 1024}
        ours = RopeConfig(theta, scaling, 8.0, 1.0, 4.0, 1024)
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=raw,
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    # llama3 blends the slow frequencies, where a last digit is nothing.
    tolerance = 2e-7 if scaling == "llama3" else 0
    found = inverse_frequencies(ours, head_dim)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)
    fast = expected > 0.01
    np.testing.assert_array_equal(found[fast], expected[fast])
