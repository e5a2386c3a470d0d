"""The transposed grouped product on Hopper, interpreted on the CPU, against dequantized weights in float32."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import hopper_routing
from pallas_kernels.experts.hopper_layout import dequantize, from_mma_order
from pallas_kernels.experts.hopper_transposed import grouped_matmul_transposed
from pallas_kernels.experts.tiles import Tiling

E = 3
NARROW = Tiling(widths=(8, 16), warpgroups=1, stages=2)


def random_matrices(seed: int, num_row_tiles: int, num_columns: int) -> tuple[jax.Array, jax.Array]:
    """Words and scales, every bit of them drawn: any word is eight codes."""
    random = np.random.default_rng(seed)
    shape = (E, num_row_tiles, num_columns)
    words = random.integers(0, 2**32, (*shape, 512), np.uint32)
    scale_bytes = random.integers(119 + 126, 123 + 126, (*shape, 32, 4), np.uint8)
    return jnp.array(words), jnp.array(scale_bytes.view(np.uint32)[..., 0])


def random_case(
    num_tokens: int, num_row_tiles: int, num_columns: int, tiling: Tiling, *, choices: Sequence[int] = range(E)
):
    """Gradients of tokens, spread to the rows of two experts each, and matrices."""
    random = np.random.default_rng(num_tokens)
    d = jnp.array(random.normal(size=(num_tokens, 64 * num_row_tiles)), jnp.bfloat16)
    ids = jnp.array(random.choice(list(choices), (num_tokens, 2)), jnp.int32)
    rows, grouping = hopper_routing.spread(d, ids, E, tiling.widths)
    return d, ids, rows, grouping, *random_matrices(num_tokens, num_row_tiles, num_columns)


@functools.partial(jax.jit, static_argnames="tiling")
def interpreted(rows, words, scales, grouping, tiling):
    return grouped_matmul_transposed(rows, words, scales, grouping, tiling=tiling, interpret=True)


def expected(d, ids, words, scales) -> np.ndarray:
    """Each pair's product in float64: its token's gradient times its expert's matrix."""
    matrices = np.asarray(from_mma_order(dequantize(words, scales)), np.float64)
    matrices = matrices.reshape(E, d.shape[1], matrices.shape[-1])
    return np.einsum("tn,tank->tak", np.asarray(d, np.float64), matrices[np.asarray(ids)])


def assert_close(found, wanted) -> None:
    assert np.linalg.norm(np.asarray(found, np.float64) - wanted) < 3e-3 * np.linalg.norm(wanted)  # of bfloat16


@pytest.mark.parametrize(
    ("tiling", "num_row_tiles", "num_columns"),
    [(NARROW, 3, 2), (NARROW, 2, 3), (Tiling(widths=(24,), warpgroups=2, stages=3), 4, 5)],
    ids=["odd number of steps", "strip left over", "two warpgroups"],
)
def test_is_the_product_with_the_transposed_matrix(tiling, num_row_tiles, num_columns):
    d, ids, rows, grouping, words, scales = random_case(13, num_row_tiles, num_columns, tiling)
    found = from_mma_order(interpreted(rows, words, scales, grouping, tiling))
    assert found.dtype == jnp.bfloat16
    assert found.shape == (rows.shape[0], 64 * num_columns)
    assert_close(found[grouping.places], expected(d, ids, words, scales))


def test_experts_that_are_elsewhere_or_have_no_row_change_nothing():
    d, ids, rows, grouping, words, scales = random_case(13, 3, 2, NARROW, choices=[-1, 1, E])
    found = from_mma_order(interpreted(rows, words, scales, grouping, NARROW))
    here = np.asarray(ids) == 1
    assert 0 < here.sum() < here.size
    wanted = expected(d, jnp.ones_like(ids), words, scales)
    assert_close(found[grouping.places[here]], wanted[here])


def lower(tiling: Tiling, *, num_row_tiles: int = 90, num_columns: int = 45) -> str:
    def shape(*dims: int, dtype=jnp.uint32):
        return jax.ShapeDtypeStruct(dims, dtype)

    ids = shape(4096, 4, dtype=jnp.int32)
    rows, grouping = jax.eval_shape(
        lambda d, ids: hopper_routing.spread(d, ids, 32, tiling.widths),
        shape(4096, 64 * num_row_tiles, dtype=jnp.bfloat16),
        ids,
    )
    matrices = [shape(32, num_row_tiles, num_columns, size) for size in (512, 32)]
    traced = jax.jit(functools.partial(grouped_matmul_transposed, tiling=tiling)).trace(rows, *matrices, grouping)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("num_row_tiles", [45, 90])
@pytest.mark.parametrize("warpgroups", [1, 2])
def test_published_widths_lower_to_one_kernel(warpgroups, num_row_tiles):
    text = lower(Tiling(widths=(32, 64, 96, 128), warpgroups=warpgroups), num_row_tiles=num_row_tiles)
    assert text.count("mosaic_gpu_v2") == 1


def test_what_cannot_run_is_refused_with_numbers():
    with pytest.raises(Unsupported, match=r"\(160,\) with 2 warpgroups; the most are 128 and 2"):
        lower(Tiling(widths=(160,), warpgroups=2))
    with pytest.raises(Unsupported, match=r"\(64,\) with 3 warpgroups; the most are 128 and 2"):
        lower(Tiling(widths=(64,), warpgroups=3))
    with pytest.raises(Unsupported, match="3 columns of tiles for 2 warpgroups, 1 tiles a step"):
        lower(Tiling(widths=(64,), warpgroups=2), num_columns=3)
    with pytest.raises(Unsupported, match="2 tiles a step"):
        lower(Tiling(widths=(64,), warpgroups=2, k_tiles=2))
    with pytest.raises(Unsupported, match="a ring of 1 stage"):
        lower(Tiling(widths=(64,), warpgroups=2, stages=1))
