"""Projections around attention and experts: the reference against NumPy float64, the kernels against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.projections import (
    HeadWeights,
    hopper,
    joined,
    output,
    project_to_cache,
    reference,
    route,
    unembed,
)
from pallas_kernels.projections.product import Tiles

EPS = 1e-5
D, N, K, H, E, V = 192, 6, 2, 64, 40, 208
SLOTS = 24


def random(seed: int, *shape: int, scale: float = 1.0, dtype=jnp.bfloat16) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def heads_case(num_tokens: int, dtype=jnp.bfloat16):
    heads = [
        HeadWeights(random(seed, heads, H, D, scale=0.05, dtype=dtype), random(10 + seed, heads, H, dtype=dtype))
        for seed, heads in enumerate((N, K, K))
    ]
    angle = random(20, num_tokens, H // 2, dtype=jnp.float32)
    x, scale = random(21, num_tokens, D, scale=3.0, dtype=dtype), random(22, D, dtype=dtype)
    return x, scale, heads, (jnp.cos(angle), jnp.sin(angle))


def cache_case(num_tokens: int, dtype=jnp.bfloat16):
    """Tokens in places all over the pools, every fifth of them nowhere."""
    num_pages = num_tokens // SLOTS + 2
    places = np.random.default_rng(num_tokens).permutation(num_pages * SLOTS)[:num_tokens]
    pages = np.where(np.arange(num_tokens) % 5 == 3, num_pages + np.arange(num_tokens), places // SLOTS)
    pools = (random(seed, num_pages, K, SLOTS, H, dtype=dtype) for seed in (60, 61))
    return *heads_case(num_tokens, dtype), *pools, jnp.int32(pages), jnp.int32(places % SLOTS)


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
    x, scale, parts, rotation = heads_case(5, jnp.float32)
    normed = exact_norm(x, scale)
    wanted = [exact_heads(normed, *part) for part in parts]
    wanted[:2] = [turned(heads, *rotation) for heads in wanted[:2]]
    pool, places = jnp.zeros((1, K, 5, H)), jnp.arange(5)
    queries, *pools = project_to_cache(x, scale, parts, rotation, pool, pool, 0 * places, places, eps=EPS)
    for got, want in zip([queries, *(pool[0].swapaxes(0, 1) for pool in pools)], wanted, strict=True):
        np.testing.assert_allclose(exact(got), want, **TOLERANCE)


def test_only_the_places_given_change_and_tokens_past_the_pool_go_nowhere():
    *arguments, keys, values, pages, slots = cache_case(13)
    queries, *new = reference.query_key_value(*arguments, num_kv_heads=K, eps=EPS)
    got, *pools = project_to_cache(*arguments, keys, values, pages, slots, eps=EPS)
    np.testing.assert_array_equal(got, queries)
    for pool, before, heads in zip(pools, (keys, values), new, strict=True):
        want = np.array(before)
        for token, (page, slot) in enumerate(zip(pages.tolist(), slots.tolist(), strict=True)):
            if page < len(want):
                want[page, :, slot] = heads[token]
        np.testing.assert_array_equal(pool, want)
    assert (np.asarray(pages) >= len(keys)).sum() == 2


def test_no_page_number_is_so_large_that_it_wraps_round_into_the_pool():
    *arguments, keys, values, pages, slots = cache_case(3)
    nowhere = jnp.full_like(pages, jnp.iinfo(jnp.int32).max)
    _, *pools = project_to_cache(*arguments, keys, values, nowhere, slots, eps=EPS)
    for pool, before in zip(pools, (keys, values), strict=True):
        np.testing.assert_array_equal(pool, before)


def test_joined_parts_give_the_same_heads():
    x, scale, parts, *rest = cache_case(5, jnp.float32)
    apart = project_to_cache(x, scale, parts, *rest, eps=EPS)
    together = project_to_cache(x, scale, [joined(*parts)], *rest, eps=EPS)
    for one, two in zip(apart, together, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_pools_keep_their_dtype():
    *arguments, keys, values, pages, slots = cache_case(3, jnp.float32)
    pools = keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
    queries, *got = project_to_cache(*arguments, *pools, pages, slots, eps=EPS)
    _, *want = project_to_cache(*arguments, keys, values, pages, slots, eps=EPS)
    assert queries.dtype == jnp.float32
    for pool, wide in zip(got, want, strict=True):
        np.testing.assert_array_equal(pool, wide.astype(jnp.bfloat16))


def test_output_is_added_to_the_residual():
    attended, weight, bias, residual = output_case(5, jnp.float32)
    want = exact(residual) + exact(bias) + np.einsum("TNH,DNH->TD", exact(attended), exact(weight))
    stream, _ = output(attended, weight, bias, residual)
    np.testing.assert_allclose(exact(stream), want, **TOLERANCE)


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
    x, scale, parts, rotation = heads_case(3)
    normed = jnp.asarray(exact_norm(x, scale), jnp.float32).astype(x.dtype)
    heads = jnp.asarray(exact_heads(exact(normed), *parts[0]), jnp.float32).astype(x.dtype)
    one, two = heads[..., : H // 2], heads[..., H // 2 :]
    narrow_cos, narrow_sin = (table.astype(x.dtype)[:, None] for table in rotation)
    with jax.disable_jit():
        want = jnp.concatenate([one * narrow_cos - two * narrow_sin, two * narrow_cos + one * narrow_sin], axis=-1)
        got, _, _ = reference.query_key_value(x, scale, parts, rotation, num_kv_heads=K, eps=EPS)
    assert (exact(got) != exact(want)).mean() < 0.01  # where float32 and float64 round to different neighbours


def test_equal_scores_go_to_the_lower_expert():
    x, scale, weight, _ = router_case(2)
    bias = jnp.array([1.0, 3.0, 3.0, 2.0] * 10, jnp.bfloat16)
    _, expert_ids, shares = route(x, scale, jnp.zeros_like(weight), bias, eps=EPS, experts_per_token=4)
    assert expert_ids.tolist() == [[1, 2, 5, 6]] * 2
    np.testing.assert_allclose(shares, 0.25)


def with_pools(arguments, dtype):
    return *arguments[:-4], *(pool.astype(dtype) for pool in arguments[-4:-2]), *arguments[-2:]


def narrow_heads(arguments):
    x, scale, parts, rotation, keys, values, pages, slots = arguments
    parts = [HeadWeights(*(each[:, : H // 2] for each in part)) for part in parts]
    rotation = tuple(table[:, : H // 4] for table in rotation)
    return x, scale, parts, rotation, keys[..., : H // 2], values[..., : H // 2], pages, slots


UNSUPPORTED = {
    "float32, not bfloat16": lambda: hopper.project_to_cache(*cache_case(3, jnp.float32), eps=EPS),
    "arrays of bfloat16, float32": lambda: hopper.project_to_cache(*with_pools(cache_case(40), jnp.float32), eps=EPS),
    "0 tokens, not": lambda: hopper.project_to_cache(*cache_case(0), eps=EPS),
    "slots of int8": lambda: hopper.project_to_cache(*cache_case(3)[:-1], jnp.int8([0, 1, 2]), eps=EPS),
    "heads of 32": lambda: hopper.project_to_cache(*narrow_heads(cache_case(3)), eps=EPS),
    "80 units of rows in blocks of 3": lambda: hopper.project_to_cache(*cache_case(3), eps=EPS, tiles=Tiles(3, 4, 1)),
    "16 blocks in clusters of 3": lambda: hopper.project_to_cache(*cache_case(3), eps=EPS, tiles=Tiles(5, 8, 2, 3)),
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


@pytest.mark.parametrize("num_tokens", [8, 40])
def test_hopper_writes_into_the_pools(num_tokens: int):
    """The kernel takes the pools as references: what it returns of its own are the queries."""
    traced = jax.make_jaxpr(lambda *arguments: hopper.project_to_cache(*arguments, eps=EPS))(*cache_case(num_tokens))
    names = [equation.primitive.name for equation in traced.eqns]
    assert "scatter" not in names
    [kernel] = (equation for equation in traced.eqns if "custom_vmap" in equation.primitive.name)
    assert [out.aval.shape for out in kernel.outvars] == [(num_tokens, N, H)]


def relative_error(got: jax.Array, want: jax.Array) -> float:
    return float(np.linalg.norm(exact(got) - exact(want)) / np.linalg.norm(exact(want)))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 13, 32])
def test_hopper_agrees_with_the_reference(num_tokens: int):
    cases = [
        (project_to_cache, cache_case(num_tokens), {"eps": EPS}),
        (output, output_case(num_tokens), {}),
        (route, router_case(num_tokens), {"eps": EPS, "experts_per_token": 4}),
        (unembed, unembed_case(num_tokens), {"eps": EPS}),
    ]
    for function, args, kwargs in cases:
        wanted = jax.tree.leaves(function(*args, **kwargs, impl="reference"))
        for got, want in zip(jax.tree.leaves(function(*args, **kwargs, impl="hopper")), wanted, strict=True):
            assert relative_error(got, want) < 4e-3


@pytest.mark.gpu
def test_blocks_that_share_sums_give_the_same_bits():
    alone, together = (
        hopper.project_to_cache(*cache_case(13), eps=EPS, tiles=Tiles(5, 8, 2, sharers)) for sharers in (1, 4)
    )
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [33, 300, 4096])
def test_hopper_finishes_the_product_of_many_tokens(num_tokens: int):
    wanted = project_to_cache(*cache_case(num_tokens), eps=EPS, impl="reference")
    for got, want in zip(project_to_cache(*cache_case(num_tokens), eps=EPS, impl="hopper"), wanted, strict=True):
        assert relative_error(got, want) < 4e-3
