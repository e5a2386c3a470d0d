"""One suite for every backend of the expert layer, against a direct computation in NumPy float64.

Of Hopper, what runs on a CPU is the prefill form, with plain JAX for what is inline PTX in it (test_hopper_prefill.py).
The TPU forms run as they are in Pallas's TPU interpreter, memory that nothing wrote being NaN; their columns are cut
so that the last tile of gate and up is half a tile.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Unsupported, choose
from pallas_kernels.experts import BACKENDS as DOOR
from pallas_kernels.experts import (
    ExpertWeights,
    experts,
    hopper_layout,
    hopper_prefill,
    tpu_decode,
    tpu_layout,
    tpu_prefill,
)
from pallas_kernels.experts.reference import swiglu
from pallas_kernels.experts.tiles import Tiling
from pallas_kernels.experts.tpu_product import SwiGLU, Tiles
from pallas_kernels.mxfp4 import MXFP4, dequantize

ALPHA, LIMIT = 1.702, 7.0
D, F, E, A = 128, 192, 6, 3


@dataclasses.dataclass(frozen=True)
class Backend:
    run: Callable
    dtype: type
    tolerance: float
    """Of the norm of the error, relative to the answer's."""


def on_hopper(x, weights, ids, routing):
    tiling = Tiling(widths=(8, 16), warpgroups=2, stages=2)
    packed = hopper_layout.pack(weights)
    return hopper_prefill.experts(x, packed, ids, routing, alpha=ALPHA, limit=LIMIT, tiling=tiling, interpret=True)


def on_tpu(form, x, weights, ids, routing, **cut):
    return form.experts(
        x,
        tpu_layout.pack(weights),
        ids,
        routing,
        activation=SwiGLU(ALPHA, LIMIT),
        cut=Tiles(gate_up_columns=128, down_columns=128),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan"),
        **cut,
    )


def through_the_door(impl):
    return jax.jit(functools.partial(experts, alpha=ALPHA, limit=LIMIT, impl=impl))


BACKENDS = {
    "reference": Backend(through_the_door("reference"), jnp.float32, 1e-6),
    "auto": Backend(through_the_door("auto"), jnp.float32, 1e-6),
    # Activations, each expert's answer and the result are rounded to bfloat16.
    "hopper": Backend(jax.jit(on_hopper), jnp.bfloat16, 6e-3),
    "tpu decode": Backend(jax.jit(functools.partial(on_tpu, tpu_decode)), jnp.bfloat16, 6e-3),
    "tpu prefill": Backend(jax.jit(functools.partial(on_tpu, tpu_prefill, tile_rows=16)), jnp.bfloat16, 6e-3),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())


def random_weights(seed: int, *, width: int = D, expert_width: int = F) -> ExpertWeights:
    random = np.random.default_rng(seed)

    def packed(rows: int, columns: int) -> MXFP4:
        shape = (E, rows, columns // 32)
        blocks = random.integers(0, 256, (*shape, 16), np.uint8)
        return MXFP4(jnp.array(blocks), jnp.array(random.integers(118, 124, shape, np.uint8)))

    def bias(width: int) -> jax.Array:
        return jnp.array(random.normal(size=(E, width)), jnp.float32)

    return ExpertWeights(
        packed(2 * expert_width, width), bias(2 * expert_width), packed(width, expert_width), bias(width)
    )


def expected(x, weights: ExpertWeights, ids, routing) -> np.ndarray:
    gate_up, down = (np.asarray(dequantize(matrix), np.float64) for matrix in (weights.gate_up, weights.down))
    y = np.zeros(x.shape)
    for token, chosen in enumerate(np.asarray(ids)):
        for expert, share in zip(chosen, np.asarray(routing, np.float64)[token], strict=True):
            if 0 <= expert < E:
                hidden = gate_up[expert] @ np.asarray(x[token], np.float64) + weights.gate_up_bias[expert]
                gate, up = np.minimum(hidden[0::2], LIMIT), np.clip(hidden[1::2], -LIMIT, LIMIT)
                activated = gate * 0.5 * (1 + np.tanh(ALPHA * gate / 2)) * (up + 1)  # a sigmoid that cannot overflow
                y[token] += share * (down[expert] @ activated + weights.down_bias[expert])
    return y


def random_case(num_tokens: int, *, seed: int, choices=range(E), **widths):
    random = np.random.default_rng(seed)
    weights = random_weights(seed, **widths)
    x = jnp.array(random.normal(size=(num_tokens, weights.down_bias.shape[1])), jnp.float32)
    few = len(choices) < A
    ids = np.array([random.choice(list(choices), A, replace=few) for _ in range(num_tokens)]).reshape(num_tokens, A)
    return x, weights, jnp.array(ids, jnp.int32), jnp.array(random.random((num_tokens, A)), jnp.float32)


def finished(backend: Backend, *case) -> jax.Array:
    """What the backend gives, waited for: an interpreted kernel calls back into Python, where it computes with JAX
    itself, and waits for ever if this thread has asked the same device for something else meanwhile."""
    return jax.block_until_ready(backend.run(*case))


def assert_right(case, backend: Backend) -> None:
    x, *rest = case
    x = x.astype(backend.dtype)
    found = finished(backend, x, *rest)
    assert found.dtype == backend.dtype
    truth = expected(x, *rest)
    error = np.asarray(found, np.float64) - truth
    assert np.linalg.norm(error) <= backend.tolerance * np.linalg.norm(truth)
    # And no token is lost among many right ones.
    assert (np.linalg.norm(error, axis=1) <= 3 * backend.tolerance * np.linalg.norm(truth, axis=1)).all()


@every_backend
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_equals_the_direct_computation(num_tokens, backend):
    assert_right(random_case(num_tokens, seed=num_tokens), backend)


@every_backend
@pytest.mark.parametrize(
    "choices", [range(E), [3], [0, 5], [-1, 6, 4]], ids=["any expert", "one", "two", "mostly elsewhere"]
)
def test_uneven_loads_and_experts_held_elsewhere(choices, backend):
    assert_right(random_case(19, seed=5, choices=choices), backend)


@every_backend
def test_no_expert_here_gives_zeros(backend):
    x, weights, ids, routing = random_case(19, seed=1)
    found = finished(backend, x.astype(backend.dtype), weights, ids + E, routing)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("num_tokens", [0, 2, 64, 300])
def test_reference_equals_the_direct_computation_for_widths_of_no_tile(num_tokens):
    assert_right(random_case(num_tokens, seed=num_tokens, width=96, expert_width=64), BACKENDS["reference"])


def test_bfloat16_is_within_its_rounding():
    case = random_case(40, seed=8)
    assert_right(case, dataclasses.replace(BACKENDS["reference"], dtype=jnp.bfloat16, tolerance=5e-3))


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_at_most_one_expert_is_dequantized_at_a_time(num_tokens):
    x, weights, ids, routing = random_case(num_tokens, seed=2, width=256)
    run = jax.jit(lambda *args: experts(*args, alpha=ALPHA, limit=LIMIT))
    temporaries = run.lower(x, weights, ids, routing).compile().memory_analysis().temp_size_in_bytes
    one_expert = 4 * 3 * F * 256
    rows = 4 * num_tokens * A * (3 * F + 6 * 256)
    assert temporaries < 2 * one_expert + 2 * rows + 2**16 < 4 * E * 3 * F * 256 + 2 * rows


def test_swiglu_published_values():
    pairs = np.array([[1, 0], [1, 1], [10, 10], [-10, 3], [-2, -10], [3, -1]], np.float32)
    values = [0.8457957659, 1.6915915319, 55.9996250264, -1.6231845e-06, 0.3860482646, 0]
    np.testing.assert_allclose(swiglu(jnp.array(pairs), alpha=ALPHA, limit=LIMIT)[:, 0], values, rtol=1e-5)


def test_unknown_implementation_is_refused_by_name():
    with pytest.raises(Unsupported, match="experts: no implementation 'abacus'"):
        choose("experts", DOOR, "abacus")
