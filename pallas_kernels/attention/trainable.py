"""Attention with gradients over rows of packed segments, in plain JAX: causal, with sinks and windows."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

_SCORES = 1 << 24
"""Scores computed at a time: 64 MB in float32."""
_BANDS = 4
"""Pieces that the causal triangle is cut into: all queries of one visit the keys of its last."""


def segment_attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    sinks: Float[Array, " N"],
    *,
    window: int | None,
    block: int = 512,
) -> Float[Array, "B T N H"]:
    """See `pallas_kernels.attention.segment_attention`; any dtype, width and number of heads.

    `block` queries of some heads are taken at a time, with the keys that they may see.
    """
    batch, length, num_heads, width = queries.shape
    num_kv_heads = keys.shape[2]
    reach = length if window is None else min(window, length)
    block = min(block, 2 * reach, length)  # of the scores computed, a window should need a fair part
    padding = -length % block

    def by_head(array: Float[Array, "B T any H"]) -> Float[Array, "heads each padded H"]:
        array = jnp.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0)))
        array = array.reshape(batch, length + padding, num_kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
        return array.reshape(-1, *array.shape[2:])

    # Finite, so that a position which sees neither keys nor a sink of -inf takes no difference of infinities.
    sinks = jnp.maximum(sinks.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    answers = _jitted(
        by_head(queries),
        by_head(keys)[:, 0],
        by_head(values)[:, 0],
        jnp.repeat(jnp.pad(segments, ((0, 0), (0, padding))), num_kv_heads, axis=0),
        jnp.tile(sinks.reshape(num_kv_heads, -1), (batch, 1)),
        reach=reach,
        block=block,
    )
    return answers.reshape(batch, num_heads, length + padding, width)[:, :, :length].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    queries: Float[Array, "heads G T H"],
    keys: Float[Array, "heads T H"],
    values: Float[Array, "heads T H"],
    segments: Int[Array, "heads T"],
    sinks: Float[Array, "heads G"],
    reach: int,
    block: int,
) -> Float[Array, "heads G T H"]:
    return _forward(queries, keys, values, segments, sinks, reach, block)[0]


def _forward(queries: Array, keys: Array, values: Array, segments: Array, sinks: Array, reach: int, block: int):
    def some_heads(results, queries, keys, values, segments, sinks):
        for view_at, num_blocks in _bands(queries.shape[2], reach, block):

            def one_block(index: Array, results: tuple[Array, Array], view_at: Callable = view_at):
                view = view_at(index)
                answers, log_sums = results
                scores = view.scores(queries, keys, segments)
                highest = jnp.maximum(scores.max(axis=-1), sinks[..., None])
                weights = jnp.exp(scores - highest[..., None])
                denominator = weights.sum(axis=-1) + jnp.exp(sinks[..., None] - highest)
                answer = _einsum("cgts,csh->cgth", weights.astype(values.dtype), view.of_keys(values))
                answers = view.put(answers, (answer / denominator[..., None]).astype(queries.dtype))
                return answers, view.put(log_sums, (highest + jnp.log(denominator))[..., None])

            results = jax.lax.fori_loop(0, num_blocks, one_block, results)
        return results

    arguments = (queries, keys, values, segments, sinks)
    unwritten = queries, queries[..., :1].astype(jnp.float32)
    answers, log_sums = _by_heads(some_heads, _heads_at_once(queries, reach, block), unwritten, arguments)
    return answers, (*arguments, answers, log_sums)


def _backward(reach: int, block: int, residuals: tuple[Array, ...], d_answers: Float[Array, "heads G T H"]):
    """Dao et al. 2022 (arXiv 2205.14135), appendix B.2; the sink is one more key, with zeros for a value."""

    def some_heads(results, queries, keys, values, segments, sinks, answers, log_sums, d_answers):
        d_log_sums = (answers.astype(jnp.float32) * d_answers.astype(jnp.float32)).sum(axis=-1, keepdims=True)
        d_sinks = -(jnp.exp(sinks[..., None] - log_sums[..., 0]) * d_log_sums[..., 0]).sum(axis=-1)
        sums = results[0], *(jnp.zeros_like(keys, dtype=jnp.float32) for _ in range(2))
        for view_at, num_blocks in _bands(queries.shape[2], reach, block):

            def one_block(index: Array, sums: tuple[Array, Array, Array], view_at: Callable = view_at):
                view = view_at(index)
                d_queries, d_keys, d_values = sums
                d_answer = view.of_queries(d_answers)
                log_sum, d_log_sum = view.of_queries(log_sums), view.of_queries(d_log_sums)
                weights = jnp.exp(view.scores(queries, keys, segments) - log_sum)
                d_weights = _einsum("cgth,csh->cgts", d_answer, view.of_keys(values))
                d_scores = (weights * (d_weights - d_log_sum) * queries.shape[-1] ** -0.5).astype(queries.dtype)
                d_keys = view.add(d_keys, _einsum("cgts,cgth->csh", d_scores, view.of_queries(queries)))
                d_values = view.add(d_values, _einsum("cgts,cgth->csh", weights.astype(values.dtype), d_answer))
                d_query = _einsum("cgts,csh->cgth", d_scores, view.of_keys(keys))
                return view.put(d_queries, d_query.astype(queries.dtype)), d_keys, d_values

            sums = jax.lax.fori_loop(0, num_blocks, one_block, sums)
        d_queries, d_keys, d_values = sums
        return d_queries, d_keys.astype(keys.dtype), d_values.astype(values.dtype), d_sinks

    # The barrier keeps XLA from holding on to the forward pass's scores, which it would find to be the same.
    residuals, d_answers = jax.lax.optimization_barrier((residuals, d_answers))
    queries, keys, values, _, sinks, *_ = residuals
    at_once = _heads_at_once(queries, reach, block)
    unwritten = (queries, keys, values, sinks)
    d_queries, d_keys, d_values, d_sinks = _by_heads(some_heads, at_once, unwritten, (*residuals, d_answers))
    return d_queries, d_keys, d_values, None, d_sinks


_attend.defvjp(_forward, _backward)
_jitted = jax.jit(_attend, static_argnames=("reach", "block"))  # layers share one trace and one lowering


@dataclasses.dataclass(frozen=True)
class _View:
    """A block of queries and the keys that are visited for it, as slices of whole rows."""

    start: Int[Array, ""]
    """The block's first query."""
    block: int
    seen: int
    reach: int

    @property
    def first_key(self) -> Int[Array, ""]:
        return jnp.maximum(self.start - self.reach, 0)

    def of_queries(self, array: Shaped[Array, "*dims T H"]) -> Shaped[Array, "*dims block H"]:
        return jax.lax.dynamic_slice_in_dim(array, self.start, self.block, axis=array.ndim - 2)

    def of_keys(self, array: Shaped[Array, "*dims T H"]) -> Shaped[Array, "*dims seen H"]:
        return jax.lax.dynamic_slice_in_dim(array, self.first_key, self.seen, axis=array.ndim - 2)

    def put(self, whole: Float[Array, "*dims T H"], one: Float[Array, "*dims block H"]) -> Float[Array, "*dims T H"]:
        return jax.lax.dynamic_update_slice_in_dim(whole, one, self.start, axis=whole.ndim - 2)

    def add(self, total: Float[Array, "heads T H"], one: Float[Array, "heads seen H"]) -> Float[Array, "heads T H"]:
        return jax.lax.dynamic_update_slice_in_dim(total, self.of_keys(total) + one, self.first_key, axis=1)

    def scores(
        self, queries: Float[Array, "heads G T H"], keys: Float[Array, "heads T H"], segments: Int[Array, "heads T"]
    ) -> Float[Array, "heads G block seen"]:
        """Scaled; -inf where a query does not see the key."""
        own, other = self.of_queries(segments[..., None]), self.of_keys(segments[..., None])
        distance = self.start + jnp.arange(self.block)[:, None] - self.first_key - jnp.arange(self.seen)
        visible = (own == other.swapaxes(1, 2)) & (own != 0) & (distance >= 0) & (distance < self.reach)
        scores = _einsum("cgth,csh->cgts", self.of_queries(queries), self.of_keys(keys))
        # A choice between scores and -inf would have XLA keep -inf, as large as the scores, from loop to loop.
        return jnp.minimum(scores * queries.shape[-1] ** -0.5, jnp.where(visible, jnp.inf, -jnp.inf)[:, None])


def _bands(length: int, reach: int, block: int) -> list[tuple[Callable[[Array], _View], int]]:
    """For each band, what its i-th block of queries looks at (keys up to the last of the band), and how many it has."""
    num_blocks = length // block
    num_bands = min(_BANDS, num_blocks) if reach + block > length else 1
    edges = [num_blocks * band // num_bands for band in range(num_bands + 1)]

    def view_at(index: Int[Array, ""], first: int, last: int) -> _View:
        return _View((first + index) * block, block=block, seen=min(reach + block, last * block), reach=reach)

    pairs = itertools.pairwise(edges)
    return [(functools.partial(view_at, first=first, last=last), last - first) for first, last in pairs]


def _heads_at_once(queries: Float[Array, "heads G T H"], reach: int, block: int) -> int:
    """How many key/value heads to take at a time: a divisor of their number."""
    num_heads, group, length, _ = queries.shape
    most = max(1, _SCORES // (group * block * min(reach + block, length)))
    return max(count for count in range(1, min(most, num_heads) + 1) if num_heads % count == 0)


def _by_heads[T: tuple[Array, ...]](
    function: Callable[..., T], at_once: int, unwritten: T, arrays: tuple[Array, ...]
) -> T:
    """The function's results for these arrays, a few of their leading indices at a time.

    It gets their slices and those of `unwritten`, arrays of the results' shapes whose values do not count. They are
    there because XLA makes the zeros that lax.map would begin with for all layers of a model at once, before the first.
    """

    def some(index: Int[Array, ""], results: T) -> T:
        def here(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, index * at_once, at_once)

        found = function(jax.tree.map(here, results), *map(here, arrays))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * at_once, axis=0)
        return jax.tree.map(put, results, found)

    return jax.lax.fori_loop(0, len(arrays[0]) // at_once, some, unwritten)


def _einsum(dims: str, left: Array, right: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(dims, left, right, precision=precision, preferred_element_type=jnp.float32)
