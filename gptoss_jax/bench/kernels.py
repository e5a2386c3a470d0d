"""Rows of the kernels alone: a layer's experts over token counts, attention over a filled cache.

The public functions run, on the model's own prepared weights, several calls to one program, each on another layer: so
no call finds its weights in the card's cache. The program's time over its calls includes the gaps between kernels; the
kernels' own time comes from the profiler (CUPTI) where the device has one.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gptoss_jax.bench.report import Row
from gptoss_jax.bench.roofline import Ceilings, attention_work, experts_work
from gptoss_jax.bench.steps import random_cache, with_lengths
from gptoss_jax.bench.timing import Times, measure
from gptoss_jax.config import LayerKind
from gptoss_jax.model.transformer import Transformer, ambient_mesh
from gptoss_jax.sharding import activation
from pallas_kernels.attention import attention

TOKEN_COUNTS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
_PARTS: tuple[Literal["gate_up", "down"], ...] = ("gate_up", "down")
_MOST_CALLS = 8
_PROFILED_RUNS = 3


def expert_rows(model: Transformer, name: str, ceilings: Ceilings, *, num_tokens: int, seed: int = 0) -> list[Row]:
    """A row for the expert layer, and one for each of its two kernels if the profiler saw kernels of their names.

    Tokens choose their experts at random. A kernel belongs to gate/up or down if its name says so; `details` of the
    first row has every kernel's milliseconds a call.
    """
    config, calls = model.config, min(_MOST_CALLS, model.config.num_layers)
    generator = np.random.default_rng(seed)
    order = generator.random((calls, 1, num_tokens, config.num_experts)).argsort(axis=-1)
    expert_ids = order[..., : config.experts_per_token].astype(np.int32)
    num_touched = float(np.mean([np.unique(ids).size for ids in expert_ids]))
    x = jnp.asarray(generator.standard_normal((calls, 1, num_tokens, config.hidden_size), np.float32), model.dtype)
    routing = np.full(expert_ids.shape, 1 / config.experts_per_token, np.float32)
    arguments = (model, tuple(x), tuple(jnp.asarray(expert_ids)), tuple(jnp.asarray(routing)))
    run = functools.partial(_experts, *arguments)
    works = {part: experts_work(config, part, num_tokens=num_tokens, num_touched=num_touched) for part in _PARTS}
    row = functools.partial(Row.of, name, "kernel", batch=num_tokens, context=0, num_tokens=num_tokens)
    times = measure(lambda _: run()) / calls
    kernels = _kernel_times(run, calls)
    whole = row(works["gate_up"] + works["down"], ceilings, times, kernel="experts", details=_medians(kernels))
    parts = [row(works[part], ceilings, found, kernel=part) for part in _PARTS if (found := _named(kernels, part))]
    return [whole, *parts]


def attention_row(
    model: Transformer, name: str, ceilings: Ceilings, kind: LayerKind, *, batch: int, context: int, seed: int = 0
) -> Row:
    """One query a row over `context` keys, in layers of one kind: random keys, values and queries.

    The planning of pages (`Cache.step`) is in it, once for all the calls.
    """
    config = model.config
    layers = [index for index, other in enumerate(config.layer_kinds) if other == kind][:_MOST_CALLS]
    held = min(context, config.max_context) - 1
    cache = random_cache(model, batch=batch, room=held + 1, seed=seed)
    cache = with_lengths(cache, np.full((batch,), held, np.int32))
    shape = (len(layers), batch, 1, config.num_heads, config.head_dim)
    queries = jax.jit(lambda: tuple(jax.random.normal(jax.random.key(seed), shape, model.dtype)))()
    run = functools.partial(_attention, model, cache, queries, kind, tuple(layers))
    times = measure(lambda _: run()) / len(layers)
    return Row.of(
        name,
        "kernel",
        attention_work(config, kind, num_rows=batch, held=held, num_new=1),
        ceilings,
        times,
        batch=batch,
        context=context,
        num_tokens=batch,
        kernel=kind,
        details=_medians(_kernel_times(run, len(layers))),
    )


@jax.jit
def _experts(model: Transformer, xs: Sequence[Any], ids: Sequence[Any], routing: Sequence[Any]) -> list[Any]:
    with ambient_mesh(model.mesh):
        answers = []
        for layer, *arrays in zip(model.layers, xs, ids, routing, strict=False):
            x, chosen, shares = _placed(*arrays)
            answers.append(layer.experts(x, chosen, shares, residual=x, mailboxes={}, impl=model.impl)[0])
        return answers


@functools.partial(jax.jit, static_argnums=(3, 4))
def _attention(
    model: Transformer, cache: Any, queries: Sequence[Any], kind: LayerKind, layers: Sequence[int]
) -> list[Any]:
    axes = model.layers[0].attention.axes
    heads, pool, rows = activation("B T N H", axes), activation("P K S H", axes), activation("B T")
    with ambient_mesh(model.mesh):
        counts = _placed(jnp.ones((queries[0].shape[0],), jnp.int32))[0]
        step = cache.step(kind, counts, 1, model.config)
        attend = jax.shard_map(
            lambda queries, keys, values, step, sinks: attention(
                queries, keys, values, step.table, step.first, step.last, sinks, impl=model.impl
            ),
            in_specs=(heads, pool, pool, rows, P(axes)),
            out_specs=heads,
            check_vma=False,
        )
        return [
            attend(
                jax.sharding.reshard(query, heads),
                cache.keys[index],
                cache.values[index],
                step,
                model.layers[index].attention.sinks[...],
            )
            for index, query in zip(layers, queries, strict=True)
        ]


def _placed(*arrays: Any) -> tuple[Any, ...]:
    return tuple(jax.sharding.reshard(array, activation("B")) for array in arrays)


def _kernel_times(run: Callable[[], Any], calls: int) -> dict[str, list[float]]:
    """Milliseconds of every kernel on the device by its name, one list of launches each, scaled to one call.

    Empty where the profiler sees no device. A kernel that a call launches twice counts twice.
    """
    if jax.default_backend() == "cpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        for _ in range(_PROFILED_RUNS):
            jax.block_until_ready(run())
        jax.profiler.stop_trace()
        traces = list(Path(folder).rglob("*.xplane.pb"))
        data = [jax.profiler.ProfileData.from_file(str(trace)) for trace in traces]
        durations: dict[str, list[float]] = {}
        for plane in (plane for part in data for plane in part.planes if plane.name.startswith("/device:GPU")):
            for line in (line for line in plane.lines if line.name.startswith("Stream")):
                for event in line.events:
                    durations.setdefault(event.name, []).append(event.duration_ns / 1e6)
    per_call = _PROFILED_RUNS * calls
    return {name: [time * len(times) / per_call for time in times] for name, times in durations.items()}


def _medians(kernels: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(times), 6) for name, times in kernels.items()}


def _named(kernels: dict[str, list[float]], part: str) -> Times | None:
    """The kernels whose name has `part` in it, taken together; None if there are none."""
    found = [times for name, times in kernels.items() if part in name]
    if not found:
        return None
    spread = sum(float(np.subtract(*np.percentile(times, [90, 10]))) for times in found)
    return Times(median=sum(statistics.median(times) for times in found), spread=spread, first=found[0][0])
