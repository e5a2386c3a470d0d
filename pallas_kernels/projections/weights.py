"""The weights that make heads of a token."""

from typing import Any, NamedTuple

import jax.numpy as jnp


class HeadWeights(NamedTuple):
    """Weight and bias of some heads, in the order that weights are published in."""

    weight: Any
    """`heads H D`"""
    bias: Any
    """`heads H`"""


def joined(*parts: HeadWeights) -> HeadWeights:
    """The heads of all parts, in their order, as one part: a copy of the weights."""
    return HeadWeights(*(jnp.concatenate(each) for each in zip(*parts, strict=True)))
