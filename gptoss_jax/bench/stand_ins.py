"""Running a model with stages left out: what stands in their places at the doors to the kernels.

A stand-in reads no weights and costs next to nothing, yet leaves the other stages as they were: what they make is still
used, and nothing they compute is known before the loop begins. The compiler heeds data alone: it drops what it sees
unused, an optimization barrier or not.

| left out | what stands in | of its own it launches |
| --- | --- | --- |
| qkv | queries of zeros; the pools as they were | 1, once a step |
| attention | the queries | none |
| output | the residual stream plus the heads' first values | 1 |
| router | the rows as they are, random experts drawn at tracing, equal shares | 1, once a step |
| experts | the normed rows times the sum of their shares | none: added to the stream by the same launch as before |
| unembedding | logits in memory: 1 at a token that bits of the row choose, 0 elsewhere | 1 |

What nobody but a stage reads goes with it: rotations and places in the cache with qkv, the planning of visible keys
with attention. The tokens chosen go on to differ between rows and steps. Without the router as many experts are touched
as uniform routing is expected to touch, the same ones at every step.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gptoss_jax.bench.roofline import Stage
from gptoss_jax.model.transformer import Transformer
from pallas_kernels import attention, exchange, experts, projections
from pallas_kernels.exchange import Parts
from pallas_kernels.projections import HeadWeights

_MIX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)  # odd numbers of many bits, as of xxHash's


@contextlib.contextmanager
def without(model: Transformer, stages: Collection[Stage]) -> Iterator[Transformer]:
    """A model with the same arrays whose stages are left out wherever it is traced within this block.

    Its structure says what is left out, so programs of it and of `model` are never taken for each other; once traced
    it may run outside of the block too. Not for several threads.

    Example:
        >>> from gptoss_jax.bench.weights import random_model
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> with without(random_model(gpt_oss_20b()), ["attention"]) as variant:  # doctest: +SKIP
        ...     decode(variant, cache, rows, stop_ids, 64)
    """
    variant = nnx.merge(*nnx.split(model))
    variant.left_out = tuple(sorted(stages))  # pyright: ignore[reportAttributeAccessIssue]  # a part of jit's key
    tables = {
        "attention": attention.BACKENDS,
        "experts": experts.BACKENDS,
        "qkv": projections.BACKENDS["project_to_cache"],
        "output": projections.BACKENDS["output"],
        "router": projections.BACKENDS["route"],
        "unembedding": projections.BACKENDS["unembed"],
    }
    real = {stage: dict(tables[stage]) for stage in stages}
    try:
        for stage in stages:
            tables[stage].update(dict.fromkeys(tables[stage], _stand_in(stage)))
        yield variant
    finally:
        for stage, backends in real.items():
            tables[stage].update(backends)


@contextlib.contextmanager
def alone(model: Transformer) -> Iterator[Transformer]:
    """`without` for the sums over devices: each device goes on with its own part, which keeps all of its other work.

    What the devices tell each other of the tokens that they found stays: one gather a step.
    """
    tables = exchange.BACKENDS, projections.BACKENDS["output"]
    real = [dict(table) for table in tables]

    def own(run: Callable[..., Any]) -> Callable[..., Any]:
        def unsummed(*args: Any, axes: Any, mailboxes: Any) -> tuple[Array, Any]:
            return run(*args, axes=(), mailboxes={})[0], mailboxes

        return unsummed

    variant = nnx.merge(*nnx.split(model))
    variant.left_out = ("collectives",)  # pyright: ignore[reportAttributeAccessIssue]  # a part of jit's key
    try:
        for table in tables:
            table.update({name: own(run) for name, run in table.items()})
        yield variant
    finally:
        for table, backends in zip(tables, real, strict=True):
            table.update(backends)


def _stand_in(stage: Stage) -> Callable[..., Any]:
    match stage:
        case "qkv":
            return _qkv
        case "attention":
            return _attention
        case "output":
            return _output
        case "router":
            return functools.partial(_route, generator=np.random.default_rng(0))
        case "experts":
            return _experts
        case "unembedding":
            return _unembed


def _qkv(
    x: Array,
    norm_scale: Array,
    heads: Sequence[HeadWeights],
    rotation: Any,
    keys: Array,
    values: Array,
    *_: Any,
    eps: float,
) -> tuple[Array, Array, Array]:
    num_heads = sum(part.weight.shape[0] for part in heads) - 2 * keys.shape[1]
    return jnp.zeros((x.shape[0], num_heads, heads[0].weight.shape[1]), x.dtype), keys, values


def _attention(queries: Array, *_: Any, window: int | None = None) -> Array:
    return queries


def _output(
    attended: Float[Array, "T N H"],
    weight: Array,
    bias: Array,
    residual: Float[Array, "T D"],
    *,
    mailboxes: Any,
    **_: Any,
) -> tuple[Float[Array, "T D"], Any]:
    width = residual.shape[1]
    heads = attended.reshape(attended.shape[0], -1)[:, :width]
    return residual + jnp.pad(heads, ((0, 0), (0, width - heads.shape[1]))), mailboxes


def _route(
    x: Float[Array, "T D"],
    norm_scale: Array,
    router_weight: Float[Array, "E D"],
    router_bias: Array,
    *,
    eps: float,
    experts_per_token: int,
    generator: np.random.Generator,
) -> tuple[Float[Array, "T D"], Int[Array, "T A"], Float[Array, "T A"]]:
    """Constants cost no launch; each layer draws its own when it is traced."""
    order = generator.random((x.shape[0], router_weight.shape[0])).argsort(axis=1)
    expert_ids = jnp.asarray(order[:, :experts_per_token].astype(np.int32))
    shares = jnp.full(expert_ids.shape, 1 / experts_per_token, jnp.float32)
    return x, expert_ids, shares


def _experts(x: Array, weights: Any, expert_ids: Array, routing: Array, **_: Any) -> Parts:
    chosen = jnp.where(expert_ids >= 0, routing, 0.0)
    # Term by term: a sum over a dim would be a launch.
    share = functools.reduce(jnp.add, [chosen[:, index : index + 1] for index in range(chosen.shape[1])])
    return Parts((x * share.astype(x.dtype))[:, None])


def _unembed(
    x: Float[Array, "T D"], norm_scale: Array, weight: Float[Array, "V D"], *, eps: float
) -> Float[Array, "T V"]:
    bits = jax.lax.bitcast_convert_type(x[:, : len(_MIX)].astype(jnp.float32), jnp.uint32)
    mixed = functools.reduce(jnp.add, [bits[:, index] * jnp.uint32(factor) for index, factor in enumerate(_MIX)])
    token = ((mixed ^ (mixed >> 15)) % jnp.uint32(weight.shape[0])).astype(jnp.int32)
    logits = (jnp.arange(weight.shape[0], dtype=jnp.int32) == token[:, None]).astype(jnp.float32)
    return jax.lax.optimization_barrier(logits)  # in memory like the real ones, for sampling to read them there
