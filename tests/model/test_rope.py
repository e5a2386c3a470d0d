import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import gpt_oss_20b
from gptoss_jax.model.rope import concentration, inverse_frequencies, rotate, rotations

# Computed from the published config with the untruncated bounds 8.0928 and 17.3980.
FREQUENCIES = [
    1, 0.689044306, 0.474782055, 0.327145872, 0.225418, 0.155322989, 0.107024421, 0.0737445682, 0.0508132748,
    0.0317056962, 0.0193350011, 0.0115920493, 0.00679495949, 0.00386035932, 0.00209379238, 0.0010526021,
    0.000456483919, 0.000129318701, 3.83088124e-05, 2.6396469e-05, 1.81883367e-05, 1.25325698e-05, 8.63549588e-06,
    5.95023926e-06, 4.09997848e-06, 2.82506683e-06, 1.94659621e-06, 1.34129104e-06, 9.2420895e-07, 6.36820915e-07,
    4.38797825e-07, 3.02351143e-07,
]  # fmt: skip


def test_published_frequencies():
    np.testing.assert_allclose(inverse_frequencies(gpt_oss_20b()), FREQUENCIES, rtol=2e-6)


def test_concentration_is_yarns():
    assert concentration(gpt_oss_20b()) == pytest.approx(1.3465735902799727, abs=1e-12)
    assert concentration(dataclasses.replace(gpt_oss_20b(), rope_factor=1.0)) == 1.0


@pytest.mark.parametrize(
    ("pair", "cos", "sin"),
    [(0, 0.3128886, 1.3097180), (8, 1.3271395, 0.2279500), (9, -0.8527389, -1.0421597), (17, 1.3463920, 0.0221144)],
)
def test_published_rotations_at_position_127(pair, cos, sin):
    found = rotations(jnp.array([[127]]), gpt_oss_20b())
    np.testing.assert_allclose([table[0, 0, pair] for table in found], [cos, sin], atol=2e-5)


def test_positions_past_bfloat16_integers_stay_apart():
    cos, _ = rotations(jnp.array([[131070, 131071]]), gpt_oss_20b())
    assert not jnp.allclose(cos[0, 0], cos[0, 1], atol=1e-3)


def test_dim_i_pairs_with_dim_i_plus_half():
    heads = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)
    cos, sin = jnp.full((1, 1, 4), 0.6), jnp.full((1, 1, 4), 0.8)
    np.testing.assert_allclose(rotate(heads, cos, sin)[0, 0, 0], [0, 0.6, 0, 0, 0, 0.8, 0, 0], atol=1e-7)


def test_scores_depend_on_distance_alone():
    config = dataclasses.replace(gpt_oss_20b(), head_dim=8)
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(at: int, distance: int) -> float:
        turned = [
            rotate(jnp.array(head), *rotations(jnp.array([[position]]), config))
            for head, position in ((query, at + distance), (key, at))
        ]
        return float(jnp.vdot(*turned))

    assert score(3, 9) == pytest.approx(score(900, 9), rel=1e-3)
    assert score(3, 9) != pytest.approx(score(3, 10), rel=1e-2)
