"""The weights of one layer's experts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.mxfp4 import MXFP4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """One layer's experts, as published: matrices are [out, in], gate and up alternate by row (gate first)."""

    gate_up: MXFP4
    """Packed `E 2F D`."""
    gate_up_bias: Any
    """`E 2F`."""
    down: MXFP4
    """Packed `E D F`."""
    down_bias: Any
    """`E D`."""

    @property
    def num_experts(self) -> int:
        """Experts held here."""
        return self.down_bias.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseExperts:
    """One layer's experts unpacked, in bfloat16 or float32, to be trained; laid out as `ExpertWeights`."""

    gate_up: Any
    """`E 2F D`."""
    gate_up_bias: Any
    """`E 2F`."""
    down: Any
    """`E D F`."""
    down_bias: Any
    """`E D`."""

    @property
    def num_experts(self) -> int:
        """Experts held here."""
        return self.down_bias.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertAdapters:
    """Changes of low rank r to one layer's matrices: b @ a is added to each expert's, the scale being in b already."""

    gate_up_a: Any
    """`E r D`."""
    gate_up_b: Any
    """`E 2F r`."""
    down_a: Any
    """`E r F`."""
    down_b: Any
    """`E D r`."""


class ScaleTooLarge(Unsupported):
    """A scale byte that a backend's arithmetic cannot reach."""


def refuse_odd_widths(weights: ExpertWeights, multiple: int) -> None:
    """Raise Unsupported unless D and F are multiples of this number."""
    width, expert_width = weights.gate_up.shape[-1], weights.down.shape[-1]
    if width % multiple or expert_width % multiple:
        raise Unsupported(f"tiles of {multiple}: D = {width} and F = {expert_width} must both be multiples of it")


def refuse_large_scales(weights: ExpertWeights, most: int) -> None:
    """Raise ScaleTooLarge if a scale byte is above `most`. Looks at the values: not under jit.

    Example:
        >>> matrix = MXFP4(jnp.zeros((1, 64, 2, 16), jnp.uint8), jnp.full((1, 64, 2), 129, jnp.uint8))
        >>> refuse_large_scales(ExpertWeights(matrix, jnp.zeros((1, 64)), matrix, jnp.zeros((1, 64))), 128)
        Traceback (most recent call last):
        ...
        pallas_kernels.experts.weights.ScaleTooLarge: gate_up has a scale byte of 129, the most is 128
    """
    for name in ("gate_up", "down"):
        largest = int(jnp.max(getattr(weights, name).scales))
        if largest > most:
            raise ScaleTooLarge(f"{name} has a scale byte of {largest}, the most is {most}")
