"""Packed experts of random codes, for the suites of the expert layers."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.experts import ExpertWeights
from pallas_kernels.mxfp4 import MXFP4


def random_experts(
    seed: int, *, num_experts: int, width: int, expert_width: int, scale_bytes: tuple[int, int] = (119, 123)
) -> ExpertWeights:
    """Any codes, and scale bytes from the first of `scale_bytes` up to before the second."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> MXFP4:
        shape = (num_experts, rows, columns // 32)
        blocks = random.integers(0, 256, (*shape, 16), np.uint8)
        return MXFP4(jnp.array(blocks), jnp.array(random.integers(*scale_bytes, shape, np.uint8)))

    def bias(rows: int) -> jax.Array:
        return jnp.array(random.normal(size=(num_experts, rows)), jnp.float32)

    gate_up, gate_up_bias = matrix(2 * expert_width, width), bias(2 * expert_width)
    return ExpertWeights(gate_up, gate_up_bias, matrix(width, expert_width), bias(width))
