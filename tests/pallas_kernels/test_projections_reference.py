"""The plain forms of the projections, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.projections.reference import norm, route


def test_norm_multiplies_in_float32_and_rounds_once():
    random = np.random.default_rng(0)
    scale = jnp.array(random.normal(size=64), jnp.bfloat16)
    x = jnp.array(random.normal(size=(1, 64)), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean() + 1e-5) * np.asarray(scale, np.float64)
    np.testing.assert_array_equal(norm(x, scale, eps=1e-5), jnp.array(exact, jnp.float32).astype(jnp.bfloat16))


def test_router_weighs_the_chosen_experts_only():
    scores = jnp.array([0.0, 3.0, 1.0, 2.0, -1.0])
    arguments = (jnp.ones((1, 4)), jnp.ones(4), jnp.zeros((5, 4)))
    _, ids, shares = route(*arguments, scores, eps=0.0, experts_per_token=2)
    assert ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(shares[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], rtol=1e-6)
    _, ids, shares = route(*arguments, jnp.zeros(5), eps=0.0, experts_per_token=4)
    assert len(set(ids[0].tolist())) == 4
    np.testing.assert_allclose(shares, 0.25)
