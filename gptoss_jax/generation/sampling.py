"""How the next token is chosen: greedy or drawn, with top-k, top-p and min-p, from one seed per request."""

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from gptoss_jax.errors import SamplingError

_MAX_SEED = 2**32 - 1
_MAX_TOP_K = 2**31 - 1


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The sampling of each row of a batch, as arrays of length B: other settings need no new compilation."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "SamplingRows":
        """One row per sampling, on the host; a missing seed is drawn here."""
        seeds = [secrets.randbits(32) if sampling.seed is None else sampling.seed for sampling in samplings]
        return cls(
            temperature=np.array([sampling.temperature for sampling in samplings], np.float32),
            top_k=np.array([sampling.top_k for sampling in samplings], np.int32),
            top_p=np.array([sampling.top_p for sampling in samplings], np.float32),
            min_p=np.array([sampling.min_p for sampling in samplings], np.float32),
            seed=np.array(seeds, np.uint32),
        )


def sample(logits: Float[Array, "B V"], rows: SamplingRows, drawn: Int[Array, " B"]) -> Int[Array, " B"]:
    """One token per row. `drawn[b]` counts the row's tokens so far: with the seed it makes the row's random key."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Int[Array, " B"]:
        scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        cuts = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
        kept = jax.lax.cond(jnp.any(cuts), _kept, lambda scaled, _: jnp.ones_like(scaled, bool), scaled, rows)
        noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(rows.seed, drawn, logits.shape[-1])
        return jnp.argmax(jnp.where(kept, scaled, -jnp.inf) + noise, axis=-1).astype(jnp.int32)

    drawn_tokens = jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy)
    return jnp.where(rows.temperature > 0, drawn_tokens, greedy)


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
