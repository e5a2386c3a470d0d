"""The two jitted steps that everything which generates is made of: prefill a chunk, decode many tokens."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.errors import CacheError
from gptoss_jax.generation.sampling import SamplingRows, sample
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import Transformer, ambient_mesh
from gptoss_jax.sharding import MODEL_AXES, activation, join_rows, per_row, split_rows

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
    """Tokens it may still choose; 0 once it has stopped. Every device has those of all rows, as of `Chosen`."""
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Newly chosen tokens, a column per step. A row's first `counts` columns are meant, the rest is filler.

    Every device has those of all rows: each process reads them.
    """

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What a turn of `decode`'s loop hands to the next."""

    going: Any
    """Whether some row may choose one more token."""
    taken: Any
    """`B`: the tokens chosen so far; equal in all rows that go on."""
    allowed: Any
    """`B`: how many it may choose; once it has stopped, those that it took."""
    columns: Any
    """`B steps fields`: the token before, then a column for each that was chosen (see `_unpacked`)."""
    cache: Cache
    """Its lengths stay those of the beginning, before `taken`."""


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
        hidden, cache = model.advance(tokens, counts, cache.met())
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
        column, _ = _choose(logits, sampling, rows.drawn, num_top=num_top)
        chosen = per_row(_unpacked)(column, (remaining > 0).astype(jnp.int32))
        return _after(rows, chosen, stop_ids), join_rows(chosen)


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
    itself is among the chosen. That a row stays within the length the cache was made for is up to the caller.
    """

    def body(state: _State) -> _State:
        # XLA merges kernels that share an array, not those that share scalars, and all this is scalars for one row: so
        # these two are one array, which the barrier keeps from being taken apart before the loop.
        (lengths, drawn), taken = jax.lax.optimization_barrier((fixed, state.taken))
        step, active = jnp.max(taken), (taken < state.allowed).astype(jnp.int32)
        tokens = jax.lax.dynamic_index_in_dim(state.columns, step, axis=1, keepdims=False)[:, :1]
        before = dataclasses.replace(state.cache, lengths=lengths + taken)
        hidden, after = model.advance(split_rows(tokens), active, before)
        logits = model.logits(hidden)[:, 0]
        column, token = _choose(logits, rows.sampling, drawn + taken, num_top=num_top)
        taken += active
        allowed = jnp.where(_is_stop(token, stop_ids), taken, state.allowed)
        return _State(
            going=jnp.any(taken < allowed),
            taken=taken,
            allowed=allowed,
            columns=jax.lax.dynamic_update_slice_in_dim(state.columns, column, step + 1, axis=1),
            cache=dataclasses.replace(after, lengths=cache.lengths),
        )

    with ambient_mesh(model.mesh):
        rows = split_rows(rows)
        fixed = jnp.stack([cache.lengths, rows.drawn])
        shape = rows.last.shape[0], 1 + DECODE_BUFFER, 2 * (1 + num_top)
        columns = jnp.zeros(shape, jnp.int32, out_sharding=activation("B")).at[:, 0, 0].set(rows.last)
        allowed = jnp.minimum(rows.remaining, jnp.minimum(limit, DECODE_BUFFER))
        state = _State(jnp.any(allowed > 0), jnp.zeros_like(allowed), allowed, columns, cache.met())
        state = jax.lax.while_loop(lambda state: state.going, body, state)
        chosen = per_row(_unpacked)(state.columns[:, 1:], state.taken)
        cache = dataclasses.replace(state.cache, lengths=cache.lengths + state.taken)
        return _after(rows, chosen, stop_ids), join_rows(chosen), cache


def _last_token(hidden: Float[Array, "B T D"], counts: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
    return jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)


def _choose(
    logits: Float[Array, "B V"], sampling: SamplingRows, drawn: Int[Array, " B"], *, num_top: int
) -> tuple[Int[Array, "B 1 fields"], Int[Array, " B"]]:
    """One more token a row, as the column that `_unpacked` reads and by itself.

    Each device looks at its part of the vocabulary; a cut, and the most probable tokens, need all of it in one place.
    """
    whole = num_top > 0 or sampling.method == "cut"

    def choose(logits: Array, sampling: SamplingRows, drawn: Array) -> tuple[Array, Array]:
        token, logit, log_total = sample(logits, sampling, drawn, axes=() if whole else MODEL_AXES)
        top_logits, top_ids = _best(logits, num_top)
        ids = jnp.concatenate([token[:, None], top_ids], axis=1)
        logprobs = jnp.concatenate([logit[:, None], top_logits], axis=1) - log_total[:, None]
        column = jnp.concatenate([ids, jax.lax.bitcast_convert_type(logprobs, jnp.int32)], axis=1)
        return column[:, None], token

    split = activation("B" if whole else "B V")
    rows = activation("B")
    placed = jax.sharding.reshard(logits, split), *split_rows((sampling, drawn))
    return jax.shard_map(choose, in_specs=(split, rows, rows), out_specs=rows, check_vma=False)(*placed)


def _unpacked(columns: Int[Array, "B steps fields"], counts: Int[Array, " B"]) -> Chosen:
    """What was chosen, from columns that hold ids, then the bits of log-probabilities: in each, the token's first."""
    ids, logprobs = jnp.split(columns, 2, axis=-1)
    logprobs = jax.lax.bitcast_convert_type(logprobs, jnp.float32)
    return Chosen(
        ids=ids[..., 0],
        logprobs=logprobs[..., 0],
        top_ids=ids[..., 1:],
        top_logprobs=logprobs[..., 1:],
        counts=counts,
    )


def _best(logits: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B top"], Int[Array, "B top"]]:
    """The largest logits and their ids; asked for none, XLA's top_k would sort them all."""
    if count == 0:
        return logits[:, :0], jnp.zeros((logits.shape[0], 0), jnp.int32)
    best, ids = jax.lax.top_k(logits, count)
    return best, ids


def _after(rows: Rows, chosen: Chosen, stop_ids: Int[Array, " stops"]) -> Rows:
    """The rows once these tokens have been chosen; those that had stopped stay as they were."""
    some = chosen.counts > 0
    last = jnp.where(some, per_row(_newest)(chosen.ids, chosen.counts), rows.last)
    stopped = some & _is_stop(last, stop_ids)
    return dataclasses.replace(
        rows,
        last=last,
        drawn=rows.drawn + chosen.counts,
        remaining=join_rows(jnp.where(stopped, 0, jnp.maximum(rows.remaining - chosen.counts, 0))),
    )


def _newest(ids: Int[Array, "B steps"], counts: Int[Array, " B"]) -> Int[Array, " B"]:
    return jnp.take_along_axis(ids, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]


def _is_stop(tokens: Int[Array, " B"], stop_ids: Int[Array, " stops"]) -> Bool[Array, " B"]:
    return jnp.any(tokens == stop_ids[:, None], axis=0)
