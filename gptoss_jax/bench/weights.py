"""Seeded random weights of any architecture, drawn on the device that holds them: what a measurement needs.

The recipe is the one of the figures we compare with: norms 1, matrices N(0, 0.02), embedding N(0, 1), FP4 codes
uniform, block scales 2**-8 or 2**-7, router bias 0 so that tokens spread over the experts, other biases N(0, 0.02).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import Transformer, abstract, fill, leaves, prepare
from pallas_kernels.dispatch import Impl

Recipe = Literal["codes", "scales", "ones", "zeros", "matrix", "embedding"]

_SMALL_SCALE_BYTE = 119  # 2**-8; the other one is 2**-7
_DEVIATION = {"matrix": 0.02, "embedding": 1.0}
_WORD_BYTES = 4


def random_model(
    config: ModelConfig, *, mesh: Mesh | None = None, dtype: Any = jnp.bfloat16, seed: int = 0, impl: Impl = "auto"
) -> Transformer:
    """A model ready to run. Each parameter is drawn where it stays, so memory holds little more than the weights.

    Example:
        >>> from gptoss_jax.config import gpt_oss_120b
        >>> model = random_model(gpt_oss_120b())  # doctest: +SKIP
    """
    model = abstract(config, mesh=mesh, dtype=dtype, impl=impl)
    return prepare(fill(model, random_arrays(leaves(model), seed=seed)))


def random_arrays(leaves: Mapping[str, jax.ShapeDtypeStruct], *, seed: int = 0) -> dict[str, Array]:
    """An array for each path of a checkpoint, or of masters, as its leaf says, drawn where it stays."""
    key = jax.random.key(seed)
    return {
        path: _drawing(_recipe(path), leaf.shape, leaf.dtype, leaf.sharding)(jax.random.fold_in(key, index))
        for index, (path, leaf) in enumerate(leaves.items())
    }


def _recipe(path: str) -> Recipe:
    if path == "embedding.weight":
        return "embedding"
    if path.endswith("router.bias"):
        return "zeros"
    by_leaf: dict[str, Recipe] = {"blocks": "codes", "scales": "scales", "scale": "ones"}
    return by_leaf.get(path.rpartition(".")[2], "matrix")


@functools.cache
def _drawing(recipe: Recipe, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Callable[[Array], Array]:
    """One compiled function for all parameters of a kind: the layers share it."""

    def draw(key: Array) -> Array:
        match recipe:
            case "ones":
                return jnp.ones(shape, dtype)
            case "zeros":
                return jnp.zeros(shape, dtype)
            case "scales":
                return _SMALL_SCALE_BYTE + (_random_bytes(key, shape) & 1)
            case "codes":
                return _random_bytes(key, shape)
            case "matrix" | "embedding":
                return jax.random.normal(key, shape, dtype) * jnp.asarray(_DEVIATION[recipe], dtype)

    return jax.jit(draw, out_shardings=sharding)


def _random_bytes(key: Array, shape: tuple[int, ...]) -> Array:
    """Four bytes of each word drawn where the shape allows it: the generator makes words."""
    if shape[-1] % _WORD_BYTES:
        return jax.random.bits(key, shape, jnp.uint8)
    words = jax.random.bits(key, (math.prod(shape) // shape[-1], shape[-1] // _WORD_BYTES), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(shape)
