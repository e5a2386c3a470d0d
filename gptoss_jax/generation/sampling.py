"""How the next token is chosen: greedy or drawn, with top-k, top-p and min-p, from one seed per request."""

import dataclasses
import functools
import math
import secrets
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from gptoss_jax import distributed
from gptoss_jax.errors import SamplingError

Method = Literal["greedy", "draw", "cut"]
"""What rows need to choose a token, in order of cost: the best one, random numbers too, or a sorted vocabulary too."""

_METHODS: tuple[Method, ...] = get_args(Method)
_MAX_SEED = 2**32 - 1
_MAX_TOP_K = 2**31 - 1
_LOWEST = np.finfo(np.float32).min
_PIECE = 512
"""Tokens reduced together at first; then the pieces are. A CPU adds in order: over all of them that loses digits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample one request. The default is what openai/gpt-oss recommends: temperature 1, nothing cut off.

    A request's tokens depend on its own seed alone, not on what else is in the batch: two rows with equal prompts
    and equal seeds give equal tokens.

    Example:
        >>> Sampling(temperature=0.0)
        Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=None)
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Of those, keep the fewest most probable tokens whose share reaches p."""
    min_p: float = 0.0
    """Of those, keep the tokens at least this many times as probable as the most probable one."""
    seed: int | None = None
    """0 to 2**32 - 1; None draws one from the operating system."""

    def __post_init__(self) -> None:
        for name, holds, legal in (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            ("top_k", 0 <= self.top_k <= _MAX_TOP_K, f"0 to {_MAX_TOP_K}"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", self.seed is None or 0 <= self.seed <= _MAX_SEED, f"0 to {_MAX_SEED}, or None"),
        ):
            if not holds:
                raise SamplingError(f"{name} is {getattr(self, name)}", where="sampling", fix=f"choose {legal}")

    @property
    def method(self) -> Method:
        """What a row of this sampling needs."""
        if self.temperature == 0:
            return "greedy"
        return "cut" if self.top_k > 0 or self.top_p < 1 or self.min_p > 0 else "draw"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The sampling of each row of a batch, as arrays of length B: only another `method` needs a new compilation."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any
    method: Method = dataclasses.field(metadata={"static": True})
    """What the most demanding row needs, found by `of`; the others get the tokens that they would get by themselves."""

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "SamplingRows":
        """One row per sampling, on the host; a missing seed is drawn here. Process 0's seeds hold for all."""
        own = [secrets.randbits(32) if sampling.seed is None else sampling.seed for sampling in samplings]
        seeds = distributed.tell(own)
        return cls(
            temperature=np.array([sampling.temperature for sampling in samplings], np.float32),
            top_k=np.array([sampling.top_k for sampling in samplings], np.int32),
            top_p=np.array([sampling.top_p for sampling in samplings], np.float32),
            min_p=np.array([sampling.min_p for sampling in samplings], np.float32),
            seed=np.array(seeds, np.uint32),
            method=_METHODS[max((_METHODS.index(sampling.method) for sampling in samplings), default=0)],
        )


def sample(
    logits: Float[Array, "B V"], rows: SamplingRows, drawn: Int[Array, " B"], *, axes: tuple[str, ...] = ()
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """One token per row, its logit, and the logarithm of the sum of all exponentiated logits.

    `drawn[b]` counts the row's tokens so far: with the seed it makes the row's random key. Along mesh axes `axes` the
    devices have consecutive parts of the vocabulary, and only what each found travels; a row that cuts needs all of it.
    """
    local_size, offset = logits.shape[1], None
    num_parts = jax.lax.axis_size(axes) if axes else 1
    if num_parts > 1:
        offset = jax.lax.axis_index(axes) * local_size
    padded = jnp.pad(logits, ((0, 0), (0, -local_size % _PIECE)), constant_values=-jnp.inf)
    tokens = jax.lax.broadcasted_iota(jnp.int32, padded.shape, 1)
    scores = _scores(padded, rows, drawn, offset, num_parts)
    pieces = scores, tokens, jnp.maximum(padded, _LOWEST), jnp.ones_like(padded)
    pieces = tuple(part.reshape(part.shape[0], -1, _PIECE) for part in pieces)
    for dim in (2, 1):
        pieces = jax.lax.reduce(pieces, (-np.float32(np.inf), np.int32(0), _LOWEST, np.float32(0)), _merged, (dim,))
    score, token, largest, total = pieces
    logit = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    if offset is not None:
        found = score, token + offset, largest, total, logit
        score, token, largest, total, logit = functools.reduce(_merged_parts, _gathered(found, axes, num_parts))
    return token, logit, largest + jnp.log(total)


_Summary = tuple[Array, Array, Array, Array]
"""Of some tokens: the best score, its token, the largest logit, the sum of exponentials relative to that logit."""


def _merged(one: _Summary, two: _Summary) -> _Summary:
    """The summary of two sets of tokens; a NaN wins, of equal scores the lower token's.

    Logits are finite here, so that any two differ by a number.
    """
    (score_one, token_one, largest_one, total_one), (score_two, token_two, largest_two, total_two) = one, two
    one_wins = _wins(score_one, token_one, score_two, token_two)
    one_is_larger = largest_one > largest_two
    scale = jnp.exp(-jnp.abs(largest_one - largest_two))
    return (
        jnp.where(one_wins, score_one, score_two),
        jnp.where(one_wins, token_one, token_two),
        jnp.maximum(largest_one, largest_two),
        jnp.where(one_is_larger, total_one + scale * total_two, total_two + scale * total_one),
    )


def _wins(score_one: Array, token_one: Array, score_two: Array, token_two: Array) -> Array:
    return (score_one > score_two) | ((score_one == score_two) & (token_one < token_two)) | jnp.isnan(score_one)


def _merged_parts(one: tuple[Array, ...], two: tuple[Array, ...]) -> tuple[Array, ...]:
    """`_merged` for summaries that have the best token's logit as well."""
    logit = jnp.where(_wins(*one[:2], *two[:2]), one[4], two[4])
    return (*_merged((one[0], one[1], one[2], one[3]), (two[0], two[1], two[2], two[3])), logit)


def _gathered(found: tuple[Array, ...], axes: tuple[str, ...], num_parts: int) -> list[tuple[Array, ...]]:
    """What each device found, brought to all of them as one array of bits."""
    bits = jnp.stack([jax.lax.bitcast_convert_type(part, jnp.int32) for part in found], axis=1)
    everyone = jax.lax.all_gather(bits, axes)
    return [
        tuple(jax.lax.bitcast_convert_type(everyone[device, :, field], part.dtype) for field, part in enumerate(found))
        for device in range(num_parts)
    ]


def _scores(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    drawn: Int[Array, " B"],
    offset: Int[Array, ""] | None,
    num_parts: int,
) -> Float[Array, "B V"]:
    """What each row's choice is the largest of. The noise of a token does not depend on how many follow it.

    Where the vocabulary is split, these logits are those of one of `num_parts`, from token `offset` on.
    """
    if rows.method == "greedy":
        return logits
    random = rows.temperature[:, None] > 0
    scaled = logits / jnp.where(random, rows.temperature[:, None], 1.0)
    if rows.method == "cut":
        scaled = jnp.where(_kept(scaled, rows), scaled, -jnp.inf)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(rows.seed, drawn, num_parts * logits.shape[1])
    if offset is not None:  # XLA computes no more than the slice
        noise = jax.lax.dynamic_slice_in_dim(noise, offset, logits.shape[1], axis=1)
    return jnp.where(random & (logits > -jnp.inf), scaled + noise, logits)  # -inf stays, whatever the temperature


def _gumbel(seed: UInt32[Array, ""], drawn: Int[Array, ""], vocab_size: int) -> Float[Array, " V"]:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), drawn), (vocab_size,))


def _kept(scaled: Float[Array, "B V"], rows: SamplingRows) -> Bool[Array, "B V"]:
    """Which tokens survive top-k, then top-p over what is left, then min-p."""
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    in_top_k = (rows.top_k[:, None] == 0) | (rank < rows.top_k[:, None])
    probability = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    share_before = jnp.cumsum(probability, axis=-1) - probability
    # Over a large vocabulary the float32 sum reaches 1 before the end: a top_p of 1 must cut nothing all the same.
    in_top_p = (share_before < rows.top_p[:, None]) | (rank == 0) | (rows.top_p[:, None] >= 1)
    in_min_p = probability >= rows.min_p[:, None] * probability[:, :1]
    kept = in_top_k & in_top_p & in_min_p
    return jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
