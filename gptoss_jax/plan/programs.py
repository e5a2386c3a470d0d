"""The programs that `generate` runs, lowered and compiled from shapes alone: no weight exists, nor need the devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled, Lowered

from gptoss_jax.config import ModelConfig
from gptoss_jax.generation.sampling import Sampling, SamplingRows
from gptoss_jax.generation.steps import decode, prefill, start
from gptoss_jax.model.cache import Cache, mails
from gptoss_jax.model.transformer import Transformer, abstract, ambient_mesh, fill, leaves, prepare
from pallas_kernels.dispatch import Impl

_NUM_STOP_IDS = 2
DRAWN = Sampling(seed=0)
"""Temperature 1 and nothing cut off: what the command line samples with."""


def abstract_model(config: ModelConfig, mesh: Mesh, *, dtype: Any = jnp.bfloat16, impl: Impl = "auto") -> Transformer:
    """The model as its programs take it, prepared, each parameter a shape with its sharding over the mesh's devices."""
    model = prepare(abstract(config, mesh=mesh, dtype=dtype, impl=impl))
    return fill(model, leaves(model))  # which have shardings over devices, not over the axes alone


def abstract_cache(model: Transformer, *, batch: int, max_length: int, max_chunk: int) -> Cache:
    """The cache that `Cache.create` would make for these rows. Raises what it raises."""

    def create() -> Cache:
        return Cache.create(
            model.config,
            batch=batch,
            max_length=max_length,
            max_chunk=max_chunk,
            dtype=model.dtype,
            mailboxes=mails(model.mesh),
        )

    with ambient_mesh(model.mesh):
        shapes = jax.eval_shape(create)
    return jax.tree.map(lambda leaf: _array(model.mesh, leaf.shape, leaf.dtype, *leaf.sharding.spec), shapes)


def lowered_prefill(model: Transformer, cache: Cache, num_tokens: int) -> Lowered:
    """`prefill` of `num_tokens` in each of the cache's rows."""
    tokens = _array(model.mesh, (cache.batch, num_tokens), jnp.int32, "data")
    return prefill.lower(model, cache, tokens, _array(model.mesh, (cache.batch,), jnp.int32, "data"))


def lowered_decode(model: Transformer, cache: Cache, sampling: Sampling = DRAWN) -> Lowered:
    """`decode` of the cache's rows, all sampled alike."""
    mesh, batch = model.mesh, cache.batch
    logits = _array(mesh, (batch, model.config.vocab_size), jnp.float32)
    remaining = _array(mesh, (batch,), jnp.int32, "data")
    stop_ids = _array(mesh, (_NUM_STOP_IDS,), jnp.int32)
    rows, _ = start.eval_shape(model, logits, remaining, _by_row(mesh, SamplingRows.of([sampling] * batch)), stop_ids)
    return decode.lower(model, cache, _by_row(mesh, rows), stop_ids, _array(mesh, (), jnp.int32))


def estimated_seconds(program: Compiled) -> float:
    """What the compiler for TPUs, the only one that says so, expects of one decode step or one chunk."""
    costs: Any = program.cost_analysis()
    return costs["optimal_seconds"] % 1.0  # it takes off a second for each custom call of its own without an estimate


def _by_row(mesh: Mesh, rows: Any) -> Any:
    return jax.tree.map(lambda leaf: _array(mesh, leaf.shape, leaf.dtype, "data"), rows)


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))
