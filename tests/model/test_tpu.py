"""The whole model on the TPU kernels, interpreted: the doors, the prepared weights and the wide pools fit together."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from gptoss_jax.generation.steps import prefill
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import prepare
from gptoss_jax.sharding import make_mesh
from pallas_kernels import attention
from tests.tiny import TINY, random_model

SMALL = dataclasses.replace(
    TINY, hidden_size=128, num_experts=8, vocab_size=136, num_layers=2, layer_kinds=TINY.layer_kinds[:2]
)
PROMPT, MORE = 9, 1


def logits(model) -> np.ndarray:
    """After a prompt, read in one chunk, and after each of the tokens that follow."""
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, PROMPT + MORE)).astype(np.int32)
    cache = Cache.create(SMALL, batch=2, max_length=16, max_chunk=PROMPT, dtype=model.dtype, mesh=model.mesh)
    found, place = [], 0
    for count in (PROMPT, *[1] * MORE):
        chunk = tokens[:, place : place + count]
        answer, cache = prefill(model, cache, chunk, np.full(2, count, np.int32))
        found, place = [*found, np.asarray(answer)], place + count
    return np.stack(found)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """In float32, on one device, in pools as wide as the heads."""
    return logits(random_model(SMALL))


@pytest.fixture
def wide_pools(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")


@pytest.mark.usefixtures("wide_pools")
def test_pools_wider_than_the_heads_change_nothing(expected):
    model = random_model(SMALL, mesh=make_mesh(expert=2, tensor=2))
    np.testing.assert_allclose(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("wide_pools")
def test_logits_on_the_tpu_kernels_are_those_of_the_reference(expected):
    plain = logits(random_model(SMALL, dtype=jnp.bfloat16, impl="reference"))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        model = random_model(SMALL, mesh=make_mesh(expert=2), dtype=jnp.bfloat16, impl="tpu")
        found = logits(prepare(model))
    error, usual = (np.linalg.norm(each - expected) for each in (found, plain))
    assert error < 2 * usual < 0.1 * np.linalg.norm(expected)
