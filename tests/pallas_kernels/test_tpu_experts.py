"""The TPU experts' layout, grouping and refusals; test_experts.py has what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import ExpertWeights, experts, preparable, prepare, tpu_layout
from pallas_kernels.experts.tpu import experts as tpu_experts
from pallas_kernels.experts.tpu_decode import chosen_experts
from pallas_kernels.experts.tpu_prefill import group
from pallas_kernels.experts.tpu_product import LARGEST_VMEM
from pallas_kernels.experts.weights import ScaleTooLarge
from pallas_kernels.mxfp4 import MXFP4, dequantize
from tests.pallas_kernels.test_experts import ALPHA, LIMIT, E, random_case

HELD, D, F = 3, 192, 128


def random_weights(scales: range) -> ExpertWeights:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> MXFP4:
        shape = (HELD, rows, columns // 32)
        blocks = random.integers(0, 256, (*shape, 16), np.uint8)
        return MXFP4(jnp.array(blocks), jnp.array(random.integers(scales.start, scales.stop, shape, np.uint8)))

    bias = jnp.array(random.normal(size=(HELD, 2 * F)), jnp.bfloat16)
    return ExpertWeights(matrix(2 * F, D), bias, matrix(D, F), bias[:, :D])


def test_values_survive_the_layout_bit_for_bit():
    published = random_weights(range(2, tpu_layout.LARGEST_SCALE + 1))
    packed = tpu_layout.pack(published)
    gate_up = np.asarray(dequantize(published.gate_up))
    found = np.asarray(tpu_layout.dequantize(packed.gate_up_words, packed.gate_up_scales))
    np.testing.assert_array_equal(found[:, 0], gate_up[:, 0::2].swapaxes(1, 2))
    np.testing.assert_array_equal(found[:, 1], gate_up[:, 1::2].swapaxes(1, 2))
    np.testing.assert_array_equal(packed.gate_up_bias[:, 1], published.gate_up_bias[:, 1::2].astype(jnp.float32))
    down = np.asarray(tpu_layout.dequantize(packed.down_words, packed.down_scales))
    assert down.shape == (HELD, F, 256)
    assert (down[..., D:] == 0).all()
    np.testing.assert_array_equal(down[..., :D], np.asarray(dequantize(published.down)).swapaxes(1, 2))


def test_what_no_normal_bfloat16_holds_becomes_zero():
    published = random_weights(range(2))
    packed = tpu_layout.pack(published)
    found = np.asarray(tpu_layout.dequantize(packed.down_words, packed.down_scales))[..., :D]
    truth = np.asarray(dequantize(published.down)).swapaxes(1, 2)
    assert np.abs(found - truth).max() <= 6 * 2.0**-127


def test_scales_out_of_reach_are_refused():
    with pytest.raises(ScaleTooLarge, match=r"scale byte of 25[34], the most is 252"):
        preparable(random_weights(range(250, 255)), experts_per_token=4, impl="tpu")


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "tile_rows"), [(1, 1, 8), (65, 7, 8), (65, 128, 16), (700, 5, 128)]
)
def test_tiles_cover_every_pair_once(num_tokens, num_experts, tile_rows):
    ids = np.random.default_rng(num_tokens).integers(-1, num_experts + 1, (num_tokens, 4))
    tiles, places, sources = jax.jit(group, static_argnums=(1, 2))(jnp.array(ids, jnp.int32), num_experts, tile_rows)
    places, sources = np.asarray(places), np.asarray(sources)
    here = (ids >= 0) & (ids < num_experts)
    assert (places[~here] == len(sources)).all()
    assert np.unique(places[here]).size == here.sum()
    tokens = np.broadcast_to(np.arange(num_tokens)[:, None], ids.shape)
    np.testing.assert_array_equal(sources[places[here]], tokens[here])
    count = int(tiles.num_tiles[0])
    assert set(places[here] // tile_rows) == set(range(count))
    np.testing.assert_array_equal(np.asarray(tiles.experts)[places[here] // tile_rows], ids[here])
    assert (np.diff(np.asarray(tiles.experts)) >= 0).all(), "so each expert is unpacked once"
    assert (np.asarray(tiles.sources)[count:] == max(count - 1, 0)).all()


def test_shares_of_an_expert_chosen_twice_add_up():
    tiles, shares = chosen_experts(jnp.array([[2, 2, 0]]), jnp.array([[0.5, 0.25, 1.0]]), 4)
    assert tiles.experts.tolist() == [0, 2, 2]
    assert shares[:2, 0].tolist() == [1.0, 0.75]


def test_no_token_gives_none():
    x, weights, ids, routing = random_case(0, seed=0)
    packed = prepare(weights, impl="tpu")
    assert experts(x.astype(jnp.bfloat16), packed, ids, routing, alpha=ALPHA, limit=LIMIT, impl="tpu").shape == x.shape


def test_what_cannot_run_is_refused_with_numbers():
    x, weights, ids, routing = random_case(4, seed=4)
    packed = prepare(weights, impl="tpu")
    narrow = x.astype(jnp.bfloat16)

    def run(x, weights):
        return experts(x, weights, ids, routing, alpha=ALPHA, limit=LIMIT, impl="tpu")

    with pytest.raises(Unsupported, match="as published"):
        run(narrow, weights)
    with pytest.raises(Unsupported, match="float32"):
        run(x, packed)
    with pytest.raises(Unsupported, match="width 64, weights of width 128"):
        run(narrow[:, :64], packed)
    with pytest.raises(Unsupported, match="D = 96 and F = 192"):
        prepare(random_case(1, seed=0, width=96)[1], impl="tpu")
    wide = jax.eval_shape(lambda: prepare(random_case(1, seed=0)[1], impl="tpu"))
    assert wide.num_experts == E
    huge = tpu_layout.TPUExperts(*(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, 2, 32768, 64), jnp.int32), ((1, 2, 2048, 64), jnp.int32), ((1, 2, 64), jnp.float32),
            ((1, 8, 262144), jnp.int32), ((1, 8, 262144), jnp.int32), ((1, 1, 262144), jnp.float32),
        )
    ))  # fmt: skip
    with pytest.raises(Unsupported, match=f"width 262144 .* bytes of VMEM, the most is {LARGEST_VMEM}"):
        jax.eval_shape(lambda weights: run(jnp.zeros((4, 262144), jnp.bfloat16), weights), huge)


def test_which_form_runs_does_not_matter():
    x, weights, ids, routing = random_case(129, seed=3)
    packed, narrow = prepare(weights, impl="tpu"), x.astype(jnp.bfloat16)
    run = jax.jit(
        lambda x, ids, routing: tpu_experts(
            x, packed, ids, routing, alpha=ALPHA, limit=LIMIT, interpret=pltpu.InterpretParams()
        )
    )
    many = np.asarray(run(narrow, ids, routing), np.float64)  # before the device has other work
    few = np.asarray(run(narrow[:128], ids[:128], routing[:128]), np.float64)
    assert np.linalg.norm(many[:128] - few) <= 6e-3 * np.linalg.norm(few)
