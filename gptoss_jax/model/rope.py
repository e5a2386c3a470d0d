"""Rotary positions, stretched by YaRN without rounding its bounds (arXiv 2309.00071; openai/gpt-oss)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptoss_jax.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each of the H/2 rotated pairs, float32 `H/2`.

    Between pair numbers `low` and `high`, a ramp from the trained to the stretched frequency. The bounds are not
    floored and ceiled, unlike YaRN's usual form: the published config says `truncate: false`.
    """
    width = config.head_dim
    pair = np.arange(width // 2)
    trained = config.rope_theta ** (-2 * pair / width)

    def pair_with_turns(turns: float) -> float:
        """The (fractional) pair that makes `turns` full turns over the original context."""
        ratio = config.original_context / (turns * 2 * math.pi)
        return width / 2 * math.log(ratio) / math.log(config.rope_theta)

    low, high = pair_with_turns(config.rope_beta_fast), pair_with_turns(config.rope_beta_slow)
    stretched_share = np.clip((pair - low) / (high - low), 0, 1)
    blended = stretched_share * trained / config.rope_factor + (1 - stretched_share) * trained
    return blended.astype(np.float32)


def concentration(config: ModelConfig) -> float:
    """YaRN's attention factor, which multiplies cos and sin alike (and so the scores by its square)."""
    return 0.1 * math.log(config.rope_factor) + 1.0 if config.rope_factor > 1 else 1.0


def rotations(
    positions: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """The (cos, sin) of every position and pair, concentration included, in float32."""
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(config)
    return jnp.cos(angles) * concentration(config), jnp.sin(angles) * concentration(config)


def rotate(
    heads: Float[Array, "B T heads H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Rotate dim i against dim i + H/2 (NeoX pairs), in the dtype of `heads`, as the reference does."""
    cos, sin = (table.astype(heads.dtype)[:, :, None, :] for table in (cos, sin))
    one, two = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
