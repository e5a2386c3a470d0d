"""The two jitted steps that everything which generates is made of: prefill a chunk, decode many tokens."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.errors import CacheError
from gptoss_jax.generation.sampling import SamplingRows, sample
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import Transformer, ambient_mesh
from gptoss_jax.sharding import activation, per_row, split_rows

DECODE_BUFFER = 256
"""The most tokens one dispatch of `decode` can return per row."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What decoding must remember of each row between dispatches; every field has B entries."""

    last: Any
    """The newest token: chosen, but not yet in the cache."""
    drawn: Any
    """Tokens chosen so far."""
    remaining: Any
    """Tokens it may still choose; 0 once it has stopped."""
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Newly chosen tokens, a column per step. A row's first `counts` columns are meant, the rest is filler."""

    ids: Any
    """`B steps`."""
    logprobs: Any
    """`B steps`: log-probability of each under the model itself (temperature 1, nothing cut off)."""
    top_ids: Any
    """`B steps top`: the most probable tokens, best first."""
    top_logprobs: Any
    """`B steps top`."""
    counts: Any
    """`B`."""


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
    model: Transformer, cache: Cache, tokens: Int[Array, "B T"], counts: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Cache]:
    """Read the first `counts[b]` of each row's tokens after what the cache holds; the rest of the row is padding.

    Returns the logits that follow each row's last token (of no meaning where the count is 0) and the cache, whose
    buffers are those of the one passed in. Raises CacheError for more than `cache.max_chunk` tokens. That a row
    stays within the length the cache was made for is up to the caller: lengths are not known when this is traced.
    """
    if tokens.shape[1] > cache.max_chunk:
        raise CacheError(
            f"a chunk of {tokens.shape[1]} tokens",
            where=f"a cache made for chunks of {cache.max_chunk}",
            fix="read the prompt in several chunks, or make the cache with a larger max_chunk",
        )
    with ambient_mesh(model.mesh):
        tokens, counts = split_rows((tokens, counts))
        hidden, cache = model.advance(tokens, counts, cache)
        return model.logits(per_row(_last_token)(hidden, counts))[:, 0], cache


@functools.partial(jax.jit, static_argnames="num_top")
def start(
    model: Transformer,
    logits: Float[Array, "B V"],
    remaining: Int[Array, " B"],
    sampling: SamplingRows,
    stop_ids: Int[Array, " stops"],
    *,
    num_top: int = 0,
) -> tuple[Rows, Chosen]:
    """Choose each row's first token from the logits of its prompt; rows with nothing remaining choose none."""
    with ambient_mesh(model.mesh):
        remaining, sampling = split_rows((remaining, sampling))
        rows = Rows(last=remaining, drawn=jnp.zeros_like(remaining), remaining=remaining, sampling=sampling)
        chosen = per_row(functools.partial(_choose, num_top=num_top))(logits, rows)
        return _after_choice(rows, chosen, stop_ids), chosen


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="num_top")
def decode(
    model: Transformer,
    cache: Cache,
    rows: Rows,
    stop_ids: Int[Array, " stops"],
    limit: Int[Array, ""] | int,
    *,
    num_top: int = 0,
) -> tuple[Rows, Chosen, Cache]:
    """Choose up to `limit` (at most DECODE_BUFFER) tokens per row without leaving the device.

    A row stops after a stop id, or when it has none remaining; the loop ends early once all rows have. The stop id
    itself is among the chosen.
    """
    batch = rows.last.shape[0]

    def buffer(dtype: Any, *tail: int) -> Array:
        return jnp.zeros((batch, DECODE_BUFFER, *tail), dtype, out_sharding=activation("B"))

    def going(state: tuple[Array, Rows, Chosen, Cache]) -> Array:
        step, rows, _, _ = state
        return (step < jnp.minimum(limit, DECODE_BUFFER)) & jnp.any(rows.remaining > 0)

    def body(state: tuple[Array, Rows, Chosen, Cache]) -> tuple[Array, Rows, Chosen, Cache]:
        step, rows, chosen, cache = state
        counts = (rows.remaining > 0).astype(jnp.int32)
        hidden, cache = model.advance(rows.last[:, None], counts, cache)
        logits = model.logits(hidden)[:, 0]
        new = per_row(functools.partial(_choose, num_top=num_top))(logits, rows)
        return step + 1, _after_choice(rows, new, stop_ids), _write(chosen, new, step), cache

    with ambient_mesh(model.mesh):
        chosen = Chosen(
            ids=buffer(jnp.int32),
            logprobs=buffer(jnp.float32),
            top_ids=buffer(jnp.int32, num_top),
            top_logprobs=buffer(jnp.float32, num_top),
            counts=jnp.zeros_like(rows.drawn),
        )
        _, rows, chosen, cache = jax.lax.while_loop(going, body, (jnp.int32(0), rows, chosen, cache))
        return rows, chosen, cache


def _last_token(hidden: Float[Array, "B T D"], counts: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
    return jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)


def _choose(logits: Float[Array, "B V"], rows: Rows, *, num_top: int) -> Chosen:
    """One column of chosen tokens."""
    token = sample(logits, rows.sampling, rows.drawn)[:, None]
    log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top_logits, top_ids = _best(logits, num_top)
    return Chosen(
        ids=token,
        logprobs=jnp.take_along_axis(logits, token, axis=1) - log_total,
        top_ids=top_ids[:, None],
        top_logprobs=(top_logits - log_total)[:, None],
        counts=(rows.remaining > 0).astype(jnp.int32),
    )


def _best(logits: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B top"], Int[Array, "B top"]]:
    """The largest logits and their ids; asked for none, XLA's top_k would sort them all."""
    if count == 0:
        return logits[:, :0], jnp.zeros((logits.shape[0], 0), jnp.int32)
    best, ids = jax.lax.top_k(logits, count)
    return best, ids


def _write(chosen: Chosen, new: Chosen, step: Int[Array, ""]) -> Chosen:
    """Put one new column in its place."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
    return Chosen(
        ids=put(chosen.ids, new.ids),
        logprobs=put(chosen.logprobs, new.logprobs),
        top_ids=put(chosen.top_ids, new.top_ids),
        top_logprobs=put(chosen.top_logprobs, new.top_logprobs),
        counts=chosen.counts + new.counts,
    )


def _after_choice(rows: Rows, chosen: Chosen, stop_ids: Int[Array, " stops"]) -> Rows:
    """The rows once one more column has been chosen; rows that had stopped stay as they were."""
    active, token = rows.remaining > 0, chosen.ids[:, 0]
    stopped = jnp.any(chosen.ids == stop_ids, axis=1)
    return dataclasses.replace(
        rows,
        last=jnp.where(active, token, rows.last),
        drawn=rows.drawn + active.astype(jnp.int32),
        remaining=jnp.where(active & ~stopped, rows.remaining - 1, 0),
    )
