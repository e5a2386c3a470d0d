"""Experts of the published widths, drawn on the GPU."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.experts import ExpertWeights
from pallas_kernels.mxfp4 import MXFP4
from tests.gpu.published import D, F


@pytest.fixture(scope="module")
def weights(request) -> ExpertWeights:
    def packed(key: jax.Array, rows: int) -> MXFP4:
        codes, scales = jax.random.split(key)
        shape = (request.param, rows, D // 32)
        return MXFP4(
            jax.random.bits(codes, (*shape, 16), jnp.uint8),
            119 + jax.random.randint(scales, shape, 0, 2).astype(jnp.uint8),
        )

    @jax.jit
    def draw() -> ExpertWeights:
        keys = jax.random.split(jax.random.key(request.param), 4)
        gate_up_bias = jax.random.normal(keys[2], (request.param, 2 * F), jnp.bfloat16)
        down_bias = jax.random.normal(keys[3], (request.param, D), jnp.bfloat16)
        return ExpertWeights(packed(keys[0], 2 * F), gate_up_bias, packed(keys[1], D), down_bias)

    return draw()
