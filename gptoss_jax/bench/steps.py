"""Rows of decoding and of prefilling: the functions that `generate` runs, on caches filled for the purpose."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import distributed
from gptoss_jax.bench.launches import count, step_launches
from gptoss_jax.bench.report import Row
from gptoss_jax.bench.roofline import Ceilings, Part, decode_work, prefill_work, stages
from gptoss_jax.bench.timing import measure
from gptoss_jax.errors import BenchError, DoesNotFit
from gptoss_jax.generation.generate import generate, prefill_chunk
from gptoss_jax.generation.sampling import Sampling, SamplingRows
from gptoss_jax.generation.steps import decode, start
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import Transformer, flattened
from gptoss_jax.plan.memory import shard_bytes
from gptoss_jax.sharding import fetch, place, put

_NEVER = np.array([-1], np.int32)  # no id, so no row stops
_ENDLESS = np.int32(2**30)
_HEADROOM = 1.02  # the cache is not all that a step needs


def decode_row(
    model: Transformer,
    name: str,
    ceilings: Ceilings,
    *,
    batch: int,
    context: int,
    steps: int,
    seed: int = 0,
    left_out: Part | None = None,
) -> Row:
    """Milliseconds a step of greedy decoding, over dispatches of `steps` tokens a row that no row ends.

    Every dispatch begins with `context` tokens held (fewer if the model's context would not hold `steps` more):
    random keys and values made on the device, not read from a prompt. Each row begins with a random token. `left_out`
    is what the model leaves out already (`stand_ins.without`): it is not in the row's work. Raises DoesNotFit for a
    cache that is too large, BenchError for log-probabilities that are no numbers.
    """
    held = _held(model, context, steps)
    cache = random_cache(model, batch=batch, room=held + steps, seed=seed)
    lengths = np.full((batch,), held, np.int32)
    passed = flattened(model)
    rows, shardings = _first_rows(model, batch, seed)

    def fresh_rows() -> Any:
        return jax.tree.map(put, rows, shardings)

    began = time.perf_counter()
    compiled = decode.lower(passed, with_lengths(cache, lengths), fresh_rows(), _NEVER, steps).compile()
    compile_s = time.perf_counter() - began

    def ready() -> tuple[Any, Cache]:
        return fresh_rows(), with_lengths(cache, lengths)

    def run(state: tuple[Any, Cache]) -> Any:
        nonlocal cache, chosen
        _, chosen, cache = decode(passed, state[1], state[0], _NEVER, steps)
        return chosen, cache

    chosen: Any = None
    times = measure(run, ready) / steps
    _check(chosen, steps)
    distinct = [len(set(column)) for column in np.asarray(chosen.ids)[:, :steps].T.tolist()]
    return Row.of(
        name,
        "decode",
        decode_work(model.config, batch=batch, context=held + (steps - 1) / 2, without=stages(left_out)),
        ceilings,
        times,
        batch=batch,
        context=context,
        num_tokens=batch,
        left_out=left_out,
        launches=count(step_launches(compiled.as_text() or "")) if jax.default_backend() != "cpu" else None,
        compile_s=compile_s,
        temporary_bytes=_temporary_bytes(compiled),
        distinct_tokens=sum(distinct) / len(distinct),
    )


def prefill_row(model: Transformer, name: str, ceilings: Ceilings, *, num_tokens: int, seed: int = 0) -> Row:
    """Milliseconds to the first token of `generate` for one random prompt: its cache made, its chunks read."""
    generator = np.random.default_rng(seed)
    prompt = generator.integers(0, model.config.vocab_size, num_tokens, np.int32)

    def run(_: None) -> None:
        generate(model, [prompt], Sampling(temperature=0.0), max_new_tokens=1, stop_ids=())

    times = measure(run)
    return Row.of(
        name,
        "prefill",
        prefill_work(model.config, num_tokens=num_tokens),
        ceilings,
        times,
        batch=1,
        context=num_tokens,
        num_tokens=num_tokens,
        compile_s=max(0.0, times.first - times.median) / 1e3,
    )


def lowered_decode(model: Transformer, *, batch: int, context: int, steps: int) -> jax.stages.Lowered:
    """What `decode_row` will run, ready to be compiled, on any thread: its own compilation then takes no time."""
    held = _held(model, context, steps)
    cache = with_lengths(_empty_cache(model, batch=batch, room=held + steps), np.full((batch,), held, np.int32))
    rows, shardings = _first_rows(model, batch, 0)
    return decode.lower(flattened(model), cache, jax.tree.map(put, rows, shardings), _NEVER, steps)


def _held(model: Transformer, context: int, steps: int) -> int:
    return min(context, model.config.max_context - steps)


def random_cache(model: Transformer, *, batch: int, room: int, seed: int) -> Cache:
    """A cache for `room` tokens a row, its pools full of normal values. Raises DoesNotFit if it is too large."""
    leaves, structure = jax.tree.flatten(_empty_cache(model, batch=batch, room=room))
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jnp.floating):  # in place, one pool at a time: they may be most of the memory
            leaves[index] = _refill(leaf, jax.random.fold_in(jax.random.key(seed), index), leaf.sharding)
    return jax.tree.unflatten(structure, leaves)


def _empty_cache(model: Transformer, *, batch: int, room: int) -> Cache:

    def create(mesh: Any) -> Cache:
        return Cache.create(
            model.config,
            batch=batch,
            max_length=room,
            max_chunk=prefill_chunk(model, batch),
            dtype=model.dtype,
            mesh=mesh,
        )

    with jax.set_mesh(model.mesh):
        shapes = jax.eval_shape(lambda: create(None))
    needed = shard_bytes(shapes) * _HEADROOM
    free = _free_bytes()
    if free is not None and needed > free:
        raise DoesNotFit(
            f"the keys and values need {needed / 1e9:.1f} GB of a device, {free / 1e9:.1f} GB are free",
            where=f"batch {batch} at a context of {room}",
            fix="leave this row out",
        )
    return create(model.mesh)


def _refill(pool: jax.Array, key: jax.Array, sharding: Any) -> jax.Array:
    draw = jax.jit(_normal_like, donate_argnums=0, out_shardings=sharding)
    return draw(pool, key)


def _normal_like(pool: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, pool.shape, pool.dtype)


def with_lengths(cache: Cache, lengths: np.ndarray) -> Cache:
    """The same pools and tables for rows that hold this many tokens."""
    return dataclasses.replace(cache, lengths=put(lengths, cache.lengths.sharding))


def _first_rows(model: Transformer, batch: int, seed: int) -> tuple[Any, Any]:
    """What `start` makes of random logits, on the host, and where each part of it belongs."""
    logits = np.random.default_rng(seed).standard_normal((batch, model.config.vocab_size), np.float32)
    settings = SamplingRows.of([Sampling(temperature=0.0, seed=row) for row in range(batch)])
    logits, remaining, settings = place((logits, np.full(batch, _ENDLESS), settings), model.mesh)
    rows, _ = start(model, logits, remaining, settings, _NEVER)
    return fetch(rows, model.mesh), jax.tree.map(lambda leaf: leaf.sharding, rows)


def _check(chosen: Any, steps: int) -> None:
    counts, logprobs = np.asarray(chosen.counts), np.asarray(chosen.logprobs)[:, :steps]
    if not (counts == steps).all() or not np.isfinite(logprobs).all():
        raise BenchError(
            f"{counts.min()} of {steps} tokens, {np.isfinite(logprobs).mean():.0%} of them with a log-probability",
            where="decoding",
            fix="this is a fault of the kernels, not of the measurement: compare with impl='reference'",
        )


def _temporary_bytes(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def _free_bytes() -> int | None:
    """Of the process that has least; None where the platform does not say."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    own = statistics["bytes_limit"] - statistics["bytes_in_use"] if "bytes_limit" in statistics else None
    return min((free for free in distributed.exchange("free bytes", own) if free is not None), default=None)
