"""The prefill form of the expert layer on Hopper, interpreted on the CPU, against the reference, however it is cut.

test_experts.py has the cases that every backend must get right.

Interpreted are the two grouped products, with plain JAX for what is inline PTX in them. The grouping kernel is inline
PTX as a whole: here it is only lowered, and `hopper_routing.spread`, which defines it, runs in its place. tests/gpu
compares the two.

The interpreter compiles for seconds, once per shape and tiling: cases share both where they can.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import ExpertWeights, hopper_routing, reference, tiles
from pallas_kernels.experts.hopper_layout import HopperExperts, pack, to_mma_order
from pallas_kernels.experts.hopper_prefill import choose_tiling, experts
from pallas_kernels.experts.hopper_routing import group, max_tiles, num_grouped_rows
from pallas_kernels.experts.tiles import Tiling
from tests.pallas_kernels.random_experts import random_experts

ALPHA, LIMIT = 1.702, 7.0
E, A, D = 5, 3, 128
ONE_WIDTH = Tiling(widths=(24,), warpgroups=1, stages=2)
NARROW = Tiling(widths=(8, 16), warpgroups=2, stages=2)


def random_weights(seed: int, *, expert_width: int) -> ExpertWeights:
    return random_experts(seed, num_experts=E, width=D, expert_width=expert_width)


def random_case(num_tokens: int, *, choices=range(E), expert_width: int = 64):
    random = np.random.default_rng(num_tokens)
    x = jnp.array(random.normal(size=(num_tokens, D)), jnp.bfloat16)
    few = len(choices) < A
    ids = [random.choice(list(choices), A, replace=few) for _ in range(num_tokens)]
    routing = jnp.array(random.random((num_tokens, A)), jnp.float32)
    weights = random_weights(num_tokens, expert_width=expert_width)
    return x, weights, jnp.array(np.array(ids).reshape(num_tokens, A), jnp.int32), routing


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@functools.partial(jax.jit, static_argnames="tiling")
def interpreted(x, weights, ids, routing, tiling):
    return experts(x, pack(weights), ids, routing, alpha=ALPHA, limit=LIMIT, tiling=tiling, interpret=True)


@jax.jit
def expected(x, weights, ids, routing):
    return reference.experts(x.astype(jnp.float32), weights, ids, routing, alpha=ALPHA, limit=LIMIT)


def assert_equals_reference(x, weights, ids, routing, tiling) -> None:
    found = jax.block_until_ready(interpreted(x, weights, ids, routing, tiling))  # before the device has other work
    assert found.dtype == x.dtype
    # The activations, the answers and the result are bfloat16.
    assert relative_error(found, expected(x, weights, ids, routing)) < 6e-3


@pytest.mark.parametrize(
    ("tiling", "expert_width"),
    [
        (Tiling(widths=(8, 24), warpgroups=2, k_tiles=2, stages=1), 128),
        (Tiling(widths=(16,), warpgroups=2, stages=2), 192),
    ],
    ids=["two tiles a step", "a strip left over"],
)
def test_equals_the_reference_however_it_is_cut(tiling, expert_width):
    assert_equals_reference(*random_case(7, expert_width=expert_width), tiling)


def test_no_token_gives_none():
    x, weights, ids, routing = random_case(0)
    assert experts(x, pack(weights), ids, routing, alpha=ALPHA, limit=LIMIT, interpret=True).shape == (0, D)


@pytest.mark.parametrize(
    ("num_tokens", "per_token", "num_experts", "widths"),
    [
        (1, 1, 1, (8,)),
        (3, 4, 5, (16, 32, 64)),
        (65, 4, 128, (16, 24, 32)),
        (700, 4, 5, (64, 128, 192, 256)),
        (700, 4, 32, (16, 32, 64)),
    ],
)
def test_tiles_cover_every_pair_once(num_tokens, per_token, num_experts, widths):
    random = np.random.default_rng(num_tokens)
    ids = random.integers(-1, num_experts + 1, (num_tokens, per_token))
    grouping = jax.jit(group, static_argnums=(1, 2))(jnp.array(ids, jnp.int32), num_experts, widths)
    places = np.asarray(grouping.places)
    here = (ids >= 0) & (ids < num_experts)
    num_rows = num_grouped_rows(ids.size, num_experts, widths)
    assert num_rows % 8 == 0
    assert (places[~here] == num_rows).all()
    assert np.unique(places[here]).size == places[here].size

    expert_of_row = np.full(num_rows, -1)
    expert_of_row[places[here]] = ids[here]
    count = int(grouping.num_tiles[0])
    assert count <= max_tiles(ids.size, num_experts, widths) == grouping.tile_experts.size
    covered, previous = np.zeros(num_rows, int), widths[-1]
    for expert, row, width in zip(grouping.tile_experts, grouping.tile_rows, grouping.tile_widths, strict=True):
        if count:
            size = widths[int(width)]
            inside = expert_of_row[int(row) : int(row) + size]
            assert inside.size == size
            assert set(inside) <= {int(expert), -1}
            assert (inside >= 0).any()
            assert size <= previous
            covered[int(row) : int(row) + size] += 1
            previous, count = size, count - 1
    assert covered.max(initial=0) <= 1
    assert (covered[expert_of_row >= 0] == 1).all()


def test_tokens_are_copied_to_their_rows_in_mma_order():
    x, _, ids, _ = random_case(9, choices=[0, 2, 4, 5])
    rows, grouping = jax.jit(hopper_routing.spread, static_argnums=(2, 3))(x, ids, E, (8, 16))
    ordered = to_mma_order(x)
    for token, place in np.ndindex(ids.shape):
        if ids[token, place] < E:
            np.testing.assert_array_equal(rows[grouping.places[token, place]], ordered[token])


def test_long_batches_are_counted_in_chunks():
    ids = np.random.default_rng(0).integers(0, 7, (1500, 3))
    places = np.asarray(jax.jit(group, static_argnums=(1, 2))(jnp.array(ids, jnp.int32), 7, (8,)).places).reshape(-1)
    order = np.argsort(ids.reshape(-1), kind="stable")
    np.testing.assert_array_equal(np.argsort(places), order)


def lower(num_tokens: int, per_token: int, num_experts: int, *, width: int = 128, tiling: Tiling | None = None):
    def shape(*dims: int, dtype=jnp.uint32):
        return jax.ShapeDtypeStruct(dims, dtype)

    def tiles(rows: int, columns: int):
        return [shape(num_experts, rows // 64, columns // 64, size) for size in (512, 32)]

    weights = HopperExperts(
        *tiles(2 * width, width),
        shape(num_experts, 2 * width, dtype=jnp.float32),
        *tiles(width, width),
        shape(num_experts, width, dtype=jnp.float32),
    )

    def layer(x, weights, ids, routing):
        return experts(x, weights, ids, routing, alpha=ALPHA, limit=LIMIT, tiling=tiling)

    pairs = (num_tokens, per_token)
    x = shape(num_tokens, width, dtype=jnp.bfloat16)
    traced = jax.jit(layer).trace(x, weights, shape(*pairs, dtype=jnp.int32), shape(*pairs, dtype=jnp.float32))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


# Sizes around a grid of blocks with a token each, and such that the rows are no multiple of TMA's eight.
@pytest.mark.parametrize(
    ("num_tokens", "per_token", "num_experts"),
    [
        *((num_tokens, 4, 32) for num_tokens in (65, 66, 100, 127, 129, 1000, 3000)),
        *((num_tokens, 5, 10) for num_tokens in (66, 100, 127, 129, 1000, 3000)),
        (65, 4, 128),
        (1, 1, 1),
    ],
)
def test_any_number_of_tokens_lowers_to_three_kernels(num_tokens, per_token, num_experts):
    assert lower(num_tokens, per_token, num_experts, tiling=ONE_WIDTH).count("mosaic_gpu_v2") == 3


@pytest.mark.parametrize("tiling", [tiling for _, tiling in (*tiles.PREFILL, (0, tiles.PREFILL_BEYOND))], ids=str)
def test_every_tiling_of_the_table_lowers(tiling):
    assert lower(200, 4, 32, width=192, tiling=tiling).count("mosaic_gpu_v2") == 3


def test_a_tiling_is_found_for_every_size():
    packed = jax.eval_shape(pack, random_weights(0, expert_width=64))
    for num_pairs in (1, 100, 10_000):
        tiling = choose_tiling(num_pairs, packed)
        assert tiling.k_tiles == 1
        assert tiling.warpgroups <= 2


def test_what_cannot_run_is_refused_with_numbers():
    x, weights, ids, routing = random_case(4)
    packed = pack(weights)

    def run(x=x, ids=ids, routing=routing, tiling=NARROW):
        return experts(x, packed, ids, routing, alpha=ALPHA, limit=LIMIT, tiling=tiling, interpret=True)

    with pytest.raises(Unsupported, match="bytes of shared memory"):
        lower(1_000_000, 8, 32)
    with pytest.raises(Unsupported, match="9 experts a token"):
        run(ids=jnp.zeros((4, 9), jnp.int32), routing=jnp.zeros((4, 9)))
    with pytest.raises(Unsupported, match="width 64, weights of width 128"):
        run(x=x[:, :64])
    with pytest.raises(Unsupported, match="float32"):
        run(x=x.astype(jnp.float32))
    with pytest.raises(Unsupported, match="widths"):
        run(tiling=Tiling(widths=(256,), warpgroups=3))
    with pytest.raises(Unsupported, match="cut by 3"):
        run(tiling=Tiling(widths=(16,), warpgroups=3))
