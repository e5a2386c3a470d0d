import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import gpt_oss_20b, gpt_oss_120b
from gptoss_jax.errors import CacheError, ShardingError
from gptoss_jax.model.cache import PAGE_SLOTS, Cache, Step, mails
from gptoss_jax.model.transformer import ambient_mesh
from gptoss_jax.sharding import make_mesh
from tests.tiny import TINY


def abstract_cache(config, max_length: int, **options) -> Cache:
    return jax.eval_shape(lambda: Cache.create(config, batch=1, max_length=max_length, **options))


@functools.partial(jax.jit, static_argnames=("kind", "num_tokens", "config"))
def step_at(cache: Cache, length: int, counts, *, kind: str, num_tokens: int, config) -> Step:
    with ambient_mesh(make_mesh()):
        return dataclasses.replace(cache, lengths=jnp.array([length])).step(kind, counts, num_tokens, config)


@pytest.mark.parametrize("config", [gpt_oss_20b(), gpt_oss_120b()], ids=["20b", "120b"])
def test_full_context_costs_the_full_layers_and_a_bound_that_does_not_grow(config):
    per_token = 2 * config.num_kv_heads * config.head_dim * 2
    full_layers = config.num_layers // 2

    def sliding_bytes(length: int) -> int:
        return abstract_cache(config, length).nbytes - full_layers * per_token * length

    assert sliding_bytes(131072) == sliding_bytes(4096)
    assert sliding_bytes(131072) <= full_layers * per_token * (128 + 512 + 2 * PAGE_SLOTS)


def test_short_cache_has_no_more_sliding_pages_than_full_pages():
    cache = abstract_cache(gpt_oss_20b(), 64)
    assert {table.shape for table in cache.tables.values()} == {(1, 1)}


@pytest.mark.parametrize("max_length", [0, TINY.max_context + 1])
def test_room_outside_the_context_is_refused(max_length):
    with pytest.raises(CacheError, match=f"room for {max_length} tokens .* ask for 1 to 131072"):
        Cache.create(TINY, batch=1, max_length=max_length)


def test_rows_that_do_not_divide_over_data_are_refused():
    with pytest.raises(ShardingError, match="3 rows do not divide over data = 2"):
        Cache.create(TINY, batch=3, max_length=8, mesh=make_mesh(data=2))


@pytest.mark.parametrize(("row", "seen"), [(126, 127), (127, 128), (128, 128), (129, 128), (131071, 128)])
def test_sliding_window_counts_the_query_itself(row, seen):
    config = gpt_oss_20b()
    cache = Cache.create(config, batch=1, max_length=131072, max_chunk=1, dtype=jnp.float8_e5m2)
    visible = {}
    for kind in cache.tables:
        step = step_at(cache, row, jnp.array([1]), kind=kind, num_tokens=1, config=config)
        visible[kind] = int(step.last[0, 0] - step.first[0, 0]) + 1
    assert visible == {"sliding_attention": seen, "full_attention": row + 1}


@pytest.mark.parametrize("chunk", [1, 5, 64, 100])
def test_every_visible_key_of_a_sliding_layer_is_still_in_its_ring(chunk):
    """Follow the positions that lie in each slot through many chunks, and look up each query's first and last."""
    cache = Cache.create(TINY, batch=1, max_length=2000, max_chunk=chunk)
    ring = np.full((cache.keys[0].shape[0], PAGE_SLOTS), -1)
    position = 0
    while position < 700:
        counts = jnp.array([min(chunk, 1 + position % chunk)])
        step = step_at(cache, position, counts, kind="sliding_attention", num_tokens=chunk, config=TINY)
        step = jax.device_get(step)
        count = int(counts[0])
        for token in range(count):
            ring[step.pages[0, token], step.slots[0, token]] = position + token
        slots = ring[step.table[0]].reshape(-1)
        for token in range(count):
            visible = slots[step.first[0, token] : step.last[0, token] + 1]
            wanted = np.arange(max(0, position + token - TINY.sliding_window + 1), position + token + 1)
            np.testing.assert_array_equal(visible, wanted)
        assert (step.pages[0, count:] == ring.shape[0]).all()
        assert (step.last[0, count:] < step.first[0, count:]).all()
        position += count


@pytest.mark.parametrize(
    ("axes", "groups"),
    [
        ({"data": 2, "expert": 2}, {("expert", "tensor"): 2}),
        ({"expert": 2, "tensor": 2}, {("tensor",): 2, ("expert", "tensor"): 4}),
        ({"data": 2}, {}),
    ],
    ids=str,
)
def test_every_group_that_shares_sums_has_mailboxes_and_they_survive_meeting(axes, groups):
    mesh = make_mesh(**axes)
    cache = Cache.create(TINY, batch=4, max_length=64, mesh=mesh, mailboxes=True)
    assert {group: mailbox.boxes.shape[:3] for group, mailbox in cache.mailboxes.items()} == {
        group: (mesh.size, 2, senders) for group, senders in groups.items()
    }
    for group, mailbox in cache.mailboxes.items():
        assert mailbox.holds(4, TINY.hidden_size, senders=groups[group])

    @jax.jit
    def met(cache: Cache) -> Cache:
        with ambient_mesh(mesh):
            return cache.met()

    again = met(cache)
    assert [mailbox.number.tolist() for mailbox in again.mailboxes.values()] == [[0] * mesh.size for _ in groups]


def test_there_are_mailboxes_only_where_kernels_reach_them():
    mesh = make_mesh(expert=2)
    assert not mails(mesh)
    assert Cache.create(TINY, batch=1, max_length=64, mesh=mesh).mailboxes == {}
    assert Cache.create(TINY, batch=1, max_length=64, mesh=mesh, dtype=jnp.float32, mailboxes=True).mailboxes == {}
