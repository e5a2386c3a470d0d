"""The loop of docs/architecture.md, as a user would write it."""

import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax as gj
from gptoss_jax.errors import CacheError
from gptoss_jax.sharding import make_mesh
from tests.model.test_transformer import SHARDABLE
from tests.tiny import random_model


@pytest.mark.parametrize("axes", [{}, {"data": 2, "expert": 2}], ids=["one device", "four devices"])
def test_a_loop_of_ones_own_gives_what_generate_does(axes):
    model = random_model(SHARDABLE, mesh=make_mesh(**axes))
    prompts = np.random.default_rng(0).integers(0, SHARDABLE.vocab_size, (2, 20))
    greedy = gj.Sampling(temperature=0.0)
    expected = gj.generate(model, prompts.tolist(), greedy, max_new_tokens=7, stop_ids=())

    cache = gj.Cache.create(model.config, batch=2, max_length=64, max_chunk=20, dtype=jnp.float32, mesh=model.mesh)
    logits, cache = gj.prefill(model, cache, prompts, np.array([20, 20]))
    stop_ids = np.array([-1])
    rows, first = gj.start(model, logits, np.array([7, 7]), gj.SamplingRows.of([greedy] * 2), stop_ids)
    rows, more, cache = gj.decode(model, cache, rows, stop_ids, limit=4)
    rows, rest, cache = gj.decode(model, cache, rows, stop_ids, limit=100)
    pieces = [np.asarray(chosen.ids)[:, : np.asarray(chosen.counts)[0]] for chosen in (first, more, rest)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), [completion.ids for completion in expected])


def test_a_chunk_over_the_caches_is_refused(tiny_model):
    cache = gj.Cache.create(tiny_model.config, batch=1, max_length=64, max_chunk=4, mesh=tiny_model.mesh)
    with pytest.raises(CacheError, match="a chunk of 5 tokens: a cache made for chunks of 4"):
        gj.prefill(tiny_model, cache, np.zeros((1, 5), np.int32), np.array([5]))
