"""The programs of a plan are those that `generate` runs: the same shapes in the same places."""

from typing import Any

import jax
import numpy as np
import pytest

from gptoss_jax.generation import generate as engine
from gptoss_jax.generation.generate import cache_room, chunk_size, generate, prefill_chunk
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.plan.programs import abstract_cache, abstract_model, lowered_decode, lowered_prefill
from gptoss_jax.sharding import make_mesh
from tests.plan.devices import SMALL
from tests.tiny import random_model


def _described(tree: Any) -> list[Any]:
    return [
        (leaf.shape, leaf.dtype, leaf.sharding.spec if isinstance(leaf.sharding, jax.NamedSharding) else None)
        for leaf in jax.tree.leaves(tree)
    ]


@pytest.mark.slow
def test_model_and_cache_are_those_that_generate_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, context, batch = make_mesh(data=2, tensor=2), 100, 4
    model = random_model(SMALL, mesh=mesh, dtype="bfloat16")
    passed = {}

    def spy(name: str) -> Any:
        real = getattr(engine, name)

        def run(model: Any, cache: Any, *args: Any, **settings: Any) -> Any:
            # Described before the call, which donates the cache.
            passed.setdefault(name, (_described((model, cache)), _described(args[0]), cache.max_chunk))
            return real(model, cache, *args, **settings)

        monkeypatch.setattr(engine, name, run)

    spy("prefill")
    spy("decode")
    prompts = [np.arange(1, context - 8, dtype=np.int32)] * batch
    generate(model, prompts, Sampling(seed=1), max_new_tokens=10)

    abstract = abstract_model(SMALL, mesh)
    chunk = prefill_chunk(abstract, batch)
    cache = abstract_cache(abstract, batch=batch, max_length=cache_room(context, SMALL.max_context), max_chunk=chunk)
    for name in ("prefill", "decode"):
        held, _, max_chunk = passed[name]
        assert held == _described((abstract, cache))
        assert max_chunk == cache.max_chunk
    num_tokens = chunk_size(context - 9, cache.max_chunk)
    tokens = lowered_prefill(abstract, cache, num_tokens).args_info[0][2]
    assert passed["prefill"][1][0][0] == tokens.shape == (batch, num_tokens)
    rows = jax.tree.leaves(lowered_decode(abstract, cache).args_info[0][2])
    assert [shape for shape, _, _ in passed["decode"][1]] == [leaf.shape for leaf in rows]
