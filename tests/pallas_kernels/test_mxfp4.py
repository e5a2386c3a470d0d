import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.mxfp4 import (
    CODE_VALUES,
    MXFP4,
    InvalidScale,
    code_to_float,
    dequantize,
    pack,
    quantize,
    refuse_invalid_scales,
    refuse_nonfinite,
    straight_through,
    unpack,
)

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def all_codes_and_scales() -> tuple[MXFP4, np.ndarray]:
    """Every code under every legal scale, and its value in float64."""
    scales = np.arange(255, dtype=np.uint8)
    codes = np.broadcast_to(np.tile(np.arange(16, dtype=np.uint8), 2), (255, 32))
    values = np.array(CODE_VALUES)[codes] * 2.0 ** (scales.astype(float)[:, None] - 127)
    return MXFP4(pack(jnp.array(codes))[:, None, 0], jnp.array(scales)[:, None]), values


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_code_and_scale_dequantizes_as_the_table_says(dtype):
    packed, expected = all_codes_and_scales()
    found = np.asarray(dequantize(packed, dtype).astype(jnp.float32), np.float64)
    normal = (np.abs(expected) >= SMALLEST_NORMAL) & (np.abs(expected) < 2.0**128)
    np.testing.assert_array_equal(found[normal], expected[normal])
    np.testing.assert_array_equal(found[expected == 0], 0)
    assert np.isinf(found[np.abs(expected) >= 2.0**128]).all()
    subnormal = (expected != 0) & (np.abs(expected) < SMALLEST_NORMAL)
    assert ((found == 0) | (found == expected))[subnormal].all()


@pytest.mark.parametrize(
    ("byte", "scale", "values"),
    [(0x1A, 127, [-1.0, 0.5]), (0x1A, 130, [-8.0, 4.0]), (0x7F, 126, [-3.0, 3.0])],
)
def test_published_byte_vectors(byte, scale, values):
    packed = MXFP4(jnp.full((1, 16), byte, jnp.uint8), jnp.array([scale], jnp.uint8))
    np.testing.assert_array_equal(dequantize(packed), np.tile(values, 16))


def test_codes_by_arithmetic_equal_the_table():
    found = np.asarray(code_to_float(jnp.arange(16, dtype=jnp.uint8)))
    np.testing.assert_array_equal(found, CODE_VALUES)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(CODE_VALUES))


@given(hnp.arrays(np.uint8, (3, 64), elements=st.integers(0, 15)))
@settings(deadline=None, max_examples=30)
def test_unpack_undoes_pack(codes):
    packed = pack(jnp.array(codes))
    assert packed.shape == (3, 2, 16)
    np.testing.assert_array_equal(unpack(packed), codes)


def test_low_nibble_comes_first():
    assert pack(jnp.array([1, 2] * 16, jnp.uint8))[0, 0] == 0x21


def nearest_code_magnitudes(magnitude: np.ndarray) -> np.ndarray:
    """The nearest e2m1 magnitude, ties to the even code, by comparing with all eight."""
    grid = np.array(CODE_VALUES[:8])
    distance = np.abs(magnitude[..., None] - grid)
    is_odd = np.arange(8) % 2
    return grid[np.lexsort((np.broadcast_to(is_odd, distance.shape), distance), axis=-1)[..., 0]]


@given(
    hnp.arrays(
        np.float32, (4, 32), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False, allow_subnormal=False)
    )
)
@settings(deadline=None, max_examples=60)
def test_quantize_rounds_to_the_nearest_code_under_the_shared_exponent(values):
    packed = quantize(jnp.array(values))
    largest = np.abs(values.astype(np.float64)).max(axis=1)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1, -200)
    scales = np.maximum(exponent - 2 + 127, 0)
    np.testing.assert_array_equal(packed.scales[:, 0], scales)
    scaled = values.astype(np.float64) / 2.0 ** (scales - 127.0)[:, None]
    expected = np.copysign(nearest_code_magnitudes(np.abs(scaled)), scaled)
    found = np.array(CODE_VALUES)[np.asarray(unpack(packed.blocks))]
    # XLA on the CPU flushes subnormal float32 to zero, which for a whole block of them changes no code.
    np.testing.assert_array_equal(found, expected)


def test_quantize_takes_ties_to_the_even_code():
    values = np.zeros(32, np.float32)
    values[:8] = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5.0]
    np.testing.assert_array_equal(dequantize(quantize(jnp.array(values)))[:8], [6, 0, 1, 1, 2, 2, 4, -4])


def test_quantize_of_representable_values_is_exact():
    packed, _ = all_codes_and_scales()
    middle = jax.tree.map(lambda leaf: leaf[60:200], packed)
    values = dequantize(middle)
    np.testing.assert_array_equal(dequantize(quantize(values)), values)


def test_quantize_refuses_a_dim_that_is_no_multiple_of_the_block():
    with pytest.raises(ValueError, match="last dim 33"):
        quantize(jnp.zeros((2, 33)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_gives_the_quantized_values_exactly(dtype):
    values = jnp.array(np.random.default_rng(0).normal(size=(3, 5, 64)), jnp.float32)
    found = jax.jit(straight_through, static_argnums=1)(values, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), dequantize(quantize(values)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_passes_the_gradient_unchanged(dtype):
    values = jnp.array(np.random.default_rng(1).normal(size=(5, 64)), jnp.float32)
    gradient = jnp.array(np.random.default_rng(2).normal(size=(5, 64))).astype(dtype)
    (found,) = jax.vjp(lambda values: straight_through(values, dtype), values)[1](gradient)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, gradient.astype(jnp.float32))


def test_scale_byte_255_is_refused_with_its_place():
    scales = np.full((2, 3), 127, np.uint8)
    refuse_invalid_scales(scales)
    scales[1, 2] = 255
    with pytest.raises(InvalidScale, match=r"255 \(NaN\) at index \(1, 2\)"):
        refuse_invalid_scales(scales)


def test_nonfinite_values_are_refused_with_their_place():
    refuse_nonfinite(np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"nan at index \(1,\)"):
        refuse_nonfinite(np.array([1.0, np.nan], np.float32))
