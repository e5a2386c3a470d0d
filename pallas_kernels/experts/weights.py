"""The weights of one layer's experts."""

import dataclasses
from typing import Any

import jax

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
