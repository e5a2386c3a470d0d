"""Projections around attention and experts: the reference against NumPy float64, the kernels against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.projections import hopper, output, query_key_value, route, unembed
from pallas_kernels.projections.product import Tiles

EPS = 1e-5
D, N, K, H, E, V = 192, 6, 2, 64, 40, 208


def random(seed: int, *shape: int, scale: float = 1.0, dtype=jnp.bfloat16) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def heads_case(num_tokens: int, dtype=jnp.bfloat16) -> tuple[jax.Array, ...]:
    weights = []
    for seed, heads in enumerate((N, K, K)):
        weights += [random(seed, heads, H, D, scale=0.05, dtype=dtype), random(10 + seed, heads, H, dtype=dtype)]
    angle = random(20, num_tokens, H // 2, dtype=jnp.float32)
    x, scale = random(21, num_tokens, D, scale=3.0, dtype=dtype), random(22, D, dtype=dtype)
    return x, scale, *weights, jnp.cos(angle), jnp.sin(angle)


def output_case(num_tokens: int, dtype=jnp.bfloat16) -> tuple[jax.Array, ...]:
    attended, weight = random(30, num_tokens, N, H, dtype=dtype), random(31, D, N, H, scale=0.05, dtype=dtype)
    return attended, weight, random(32, D, dtype=dtype), random(33, num_tokens, D, dtype=dtype)


def router_case(num_tokens: int, dtype=jnp.bfloat16, num_experts: int = E) -> tuple[jax.Array, ...]:
    weight, bias = random(40, num_experts, D, scale=0.05, dtype=dtype), random(41, num_experts, dtype=dtype)
    return random(42, num_tokens, D, dtype=dtype), random(43, D, dtype=dtype), weight, bias


def unembed_case(num_tokens: int, dtype=jnp.bfloat16) -> tuple[jax.Array, ...]:
    return random(50, num_tokens, D, dtype=dtype), random(51, D, dtype=dtype), random(52, V, D, scale=0.05, dtype=dtype)


def exact(values: jax.Array) -> np.ndarray:
    return np.asarray(values, np.float64)


def exact_norm(x: jax.Array, scale: jax.Array) -> np.ndarray:
    wide = exact(x)
    return wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + EPS) * exact(scale)


def exact_heads(normed: np.ndarray, weight: jax.Array, bias: jax.Array) -> np.ndarray:
    return np.einsum("TD,NHD->TNH", normed, exact(weight)) + exact(bias)


def turned(heads: np.ndarray, cos: jax.Array, sin: jax.Array) -> np.ndarray:
    """Dims i and i + H/2 as one complex number, times cos + i sin."""
    pairs = (heads[..., : H // 2] + 1j * heads[..., H // 2 :]) * (exact(cos) + 1j * exact(sin))[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def test_queries_and_keys_are_rotated_and_values_are_not():
    x, scale, *weights, cos, sin = heads_case(5, jnp.float32)
    normed = exact_norm(x, scale)
    wanted = [exact_heads(normed, *each) for each in zip(weights[::2], weights[1::2], strict=True)]
    wanted[:2] = [turned(heads, cos, sin) for heads in wanted[:2]]
    for got, want in zip(query_key_value(x, scale, *weights, cos, sin, eps=EPS), wanted, strict=True):
        np.testing.assert_allclose(exact(got), want, **TOLERANCE)


def test_output_is_added_to_the_residual():
    attended, weight, bias, residual = output_case(5, jnp.float32)
    want = exact(residual) + exact(bias) + np.einsum("TNH,DNH->TD", exact(attended), exact(weight))
    np.testing.assert_allclose(exact(output(attended, weight, bias, residual)), want, **TOLERANCE)


def test_route_takes_the_best_experts_of_the_normed_rows():
    x, scale, weight, bias = router_case(5, jnp.float32)
    normed, expert_ids, shares = route(x, scale, weight, bias, eps=EPS, experts_per_token=4)
    scores = exact_norm(x, scale) @ exact(weight).T + exact(bias)
    best = np.argsort(-scores, axis=-1)[:, :4]
    powers = np.exp(np.take_along_axis(scores, best, axis=-1))
    np.testing.assert_allclose(exact(normed), exact_norm(x, scale), **TOLERANCE)
    np.testing.assert_array_equal(expert_ids, best)
    np.testing.assert_allclose(exact(shares), powers / powers.sum(axis=-1, keepdims=True), **TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_logits_are_float32(num_tokens: int, dtype):
    x, scale, weight = unembed_case(num_tokens, dtype)
    logits = unembed(x, scale, weight, eps=EPS)
    assert logits.dtype == jnp.float32
    normed = exact(jnp.asarray(exact_norm(x, scale), jnp.float32).astype(dtype))
    np.testing.assert_allclose(exact(logits), normed @ exact(weight).T, rtol=1e-3, atol=2e-3)


def test_bfloat16_is_rounded_after_the_bias_and_after_every_step_of_the_rotation():
    x, scale, *weights, cos, sin = heads_case(3)
    normed = jnp.asarray(exact_norm(x, scale), jnp.float32).astype(x.dtype)
    heads = jnp.asarray(exact_heads(exact(normed), *weights[:2]), jnp.float32).astype(x.dtype)
    one, two = heads[..., : H // 2], heads[..., H // 2 :]
    narrow_cos, narrow_sin = (table.astype(x.dtype)[:, None] for table in (cos, sin))
    with jax.disable_jit():
        want = jnp.concatenate([one * narrow_cos - two * narrow_sin, two * narrow_cos + one * narrow_sin], axis=-1)
        got, _, _ = query_key_value(x, scale, *weights, cos, sin, eps=EPS)
    assert (exact(got) != exact(want)).mean() < 0.01  # where float32 and float64 round to different neighbours


def test_equal_scores_go_to_the_lower_expert():
    x, scale, weight, _ = router_case(2)
    bias = jnp.array([1.0, 3.0, 3.0, 2.0] * 10, jnp.bfloat16)
    _, expert_ids, shares = route(x, scale, jnp.zeros_like(weight), bias, eps=EPS, experts_per_token=4)
    assert expert_ids.tolist() == [[1, 2, 5, 6]] * 2
    np.testing.assert_allclose(shares, 0.25)


UNSUPPORTED = {
    "float32": lambda: hopper.query_key_value(*heads_case(3, jnp.float32), eps=EPS),
    "65 tokens": lambda: hopper.query_key_value(*heads_case(65), eps=EPS),
    "80 units of rows in blocks of 3": lambda: hopper.query_key_value(*heads_case(3), eps=EPS, tiles=Tiles(3, 4, 1)),
    "0 tokens": lambda: hopper.output(*output_case(0)),
    "129 tokens": lambda: hopper.route(*router_case(129), eps=EPS, experts_per_token=4),
    "264 experts": lambda: hopper.route(*router_case(1, num_experts=264), eps=EPS, experts_per_token=4),
    "36 experts": lambda: hopper.route(*router_case(1, num_experts=36), eps=EPS, experts_per_token=4),
    "33 experts per token": lambda: hopper.route(*router_case(1), eps=EPS, experts_per_token=33),
    "190 columns": lambda: hopper.unembed(*(array[..., :190] for array in unembed_case(1)), eps=EPS),
    "a vocabulary of 200": lambda: hopper.unembed(*unembed_case(1)[:2], unembed_case(1)[2][:200], eps=EPS),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_hopper_says_what_it_cannot_take(message: str):
    with pytest.raises(Unsupported, match=message):
        UNSUPPORTED[message]()


def relative_error(got: jax.Array, want: jax.Array) -> float:
    return float(np.linalg.norm(exact(got) - exact(want)) / np.linalg.norm(exact(want)))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 13, 32])
def test_hopper_agrees_with_the_reference(num_tokens: int):
    cases = [
        (query_key_value, heads_case(num_tokens), {"eps": EPS}),
        (output, output_case(num_tokens), {}),
        (route, router_case(num_tokens), {"eps": EPS, "experts_per_token": 4}),
        (unembed, unembed_case(num_tokens), {"eps": EPS}),
    ]
    for function, args, kwargs in cases:
        wanted = jax.tree.leaves(function(*args, **kwargs, impl="reference"))
        for got, want in zip(jax.tree.leaves(function(*args, **kwargs, impl="hopper")), wanted, strict=True):
            assert relative_error(got, want) < 4e-3
