"""The expert layer on TPUs: what it takes, and which of its two forms runs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import tpu_decode, tpu_prefill
from pallas_kernels.experts.tpu_layout import LARGEST_SCALE, STEP, TPUExperts
from pallas_kernels.experts.tpu_product import SwiGLU, Tiles
from pallas_kernels.experts.weights import ExpertWeights, refuse_large_scales, refuse_odd_widths


def experts(
    x: Float[Array, "T D"],
    weights: ExpertWeights | TPUExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    alpha: float,
    limit: float,
    interpret: Any = False,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.experts.experts`; bfloat16, the weights as `prepare` made them.

    The activations are rounded to bfloat16; with many tokens, each expert's answer too. `interpret` is Pallas's.
    """
    if not isinstance(weights, TPUExperts):
        raise Unsupported("experts: the TPU kernels read weights that prepare() has rearranged, not as published")
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"experts: tokens of {x.dtype}, the TPU kernels take bfloat16")
    if x.shape[1] != weights.width:
        raise Unsupported(f"experts: tokens of width {x.shape[1]}, weights of width {weights.width}")
    if expert_ids.size == 0:
        return jnp.zeros_like(x)
    form = tpu_decode if x.shape[0] <= tpu_decode.MAX_TOKENS else tpu_prefill
    activation, cut = SwiGLU(alpha, limit), Tiles()
    return form.experts(x, weights, expert_ids, routing, activation=activation, cut=cut, interpret=interpret)


def preparable(weights: ExpertWeights, *, experts_per_token: int) -> bool:
    """See `pallas_kernels.experts.preparable`: Unsupported if the kernels could not run these weights, else yes."""
    del experts_per_token  # any number
    refuse_odd_widths(weights, STEP)
    if not isinstance(weights.down_bias, jax.ShapeDtypeStruct):
        refuse_large_scales(weights, LARGEST_SCALE)
    return True
