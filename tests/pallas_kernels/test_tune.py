"""`python -m pallas_kernels.tune`: what it would try and what it does without a GPU; its times need one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tune
from pallas_kernels.experts.hopper_grouped_matmul import check
from pallas_kernels.experts.tiles import decode
from pallas_kernels.tune import FORMS, Shape, decode_candidates, prefill_candidates

SMALL = Shape(num_experts=3, per_token=2, width=64, expert_width=64)


def test_without_a_gpu_it_says_so(capsys):
    assert tune.main(["--tokens", "65"]) == 1
    assert "measures on a GPU" in capsys.readouterr().err
    with pytest.raises(tune.NoGPU, match="'cpu'"):
        next(tune.measure(FORMS["prefill"], SMALL, [65]))


@pytest.mark.parametrize("rows_per_expert", [0.5, 8.1, 16.0, 33.0, 64.0, 100.0, 128.0, 256.0, 1024.0])
def test_candidates_fit_the_published_widths(rows_per_expert):
    candidates = prefill_candidates(rows_per_expert)
    assert len(candidates) == len(set(candidates)) >= 3
    for tiling in candidates:
        assert tiling.widths == tuple(sorted(set(tiling.widths)))
        assert check(tiling, num_row_tiles=45, k_tiles=45) == 45 // tiling.k_tiles


@pytest.mark.parametrize("num_tokens", FORMS["decode"].tokens)
def test_decode_candidates_contain_the_tables_own(num_tokens):
    candidates = decode_candidates(num_tokens * 4 / 32)
    assert len(candidates) == len(set(candidates)) <= 8
    assert decode(num_tokens * 4, 32) in candidates


def test_inputs_are_tokens_with_different_experts_each():
    shape = Shape(num_experts=5, per_token=3, width=64, skew=1.0)
    x, ids, routing = tune.random_inputs(jax.random.key(0), shape, 40)
    assert (x.shape, x.dtype) == ((40, 64), jnp.bfloat16)
    assert all(len(set(row)) == 3 for row in np.asarray(ids).tolist())
    np.testing.assert_allclose(routing.sum(axis=1), 1, rtol=1e-6)


def test_weights_have_the_published_shapes():
    weights = jax.eval_shape(lambda: tune.random_weights(jax.random.key(0), SMALL))
    assert weights.gate_up.shape == (3, 128, 64)
    assert weights.down.shape == (3, 64, 64)
