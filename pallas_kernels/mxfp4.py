"""The MXFP4 format: 32 four-bit floats (e2m1) sharing one power-of-two scale (e8m0).

Source: OCP Microscaling Formats (MX) v1.0; byte order as in openai/gpt-oss gpt_oss/torch/weights.py: byte b of a
block holds value 2b in its low and value 2b + 1 in its high nibble.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

BLOCK = 32
"""Values that share one scale, consecutive along the contracted dim."""
BLOCK_BYTES = BLOCK // 2
CODE_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each nibble: one sign bit, two exponent bits, one mantissa bit."""
NAN_SCALE = 255
_SCALE_BIAS = 127
_LARGEST_EXPONENT = 2  # of 6.0, the largest e2m1 value


class InvalidScale(ValueError):
    """A scale byte of 255: NaN in e8m0, which no gpt-oss weight may hold."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4:
    """A packed array of `*rows K` values, K = 32 * J.

    The fields are whatever a pytree transformation leaves there (arrays, shapes, shardings), so they are not checked.

    Example:
        >>> packed = quantize(jnp.array([[0.5, -1.0] * 16]))
        >>> packed.blocks.shape, packed.scales.shape, packed.shape
        ((1, 1, 16), (1, 1), (1, 32))
    """

    blocks: Any
    """uint8 `*rows J 16`."""
    scales: Any
    """uint8 `*rows J`: value 2 ** (scale - 127)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        *rows, num_blocks = self.scales.shape
        return (*rows, num_blocks * BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.blocks.size + self.scales.size


def pack(codes: UInt8[Array, "*rows K"]) -> UInt8[Array, "*rows J 16"]:
    """Pack codes 0..15, two to a byte."""
    pairs = codes.reshape(*codes.shape[:-1], -1, BLOCK_BYTES, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(blocks: UInt8[Array, "*rows J 16"]) -> UInt8[Array, "*rows K"]:
    """The codes 0..15 that `pack` packed."""
    pairs = jnp.stack([blocks & 15, blocks >> 4], axis=-1)
    return pairs.reshape(*blocks.shape[:-2], -1)


def code_to_float(codes: UInt8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """The float32 value of each code, by arithmetic: `CODE_VALUES[code]` without a gather.

    The two exponent bits and the mantissa bit go to the bottom of float32's exponent and the top of its mantissa;
    only 0 and 0.5, e2m1's subnormals, need a line of their own.
    """
    wide = codes.astype(jnp.uint32)
    magnitude = wide & 7
    normal = jax.lax.bitcast_convert_type((magnitude << 22) + (126 << 23), jnp.float32)
    value = jnp.where(magnitude < 2, magnitude.astype(jnp.float32) * 0.5, normal)
    return jnp.where(wide & 8, -value, value)


def scale_to_float(scales: UInt8[Array, "*dims"]) -> Float[Array, "*dims"]:
    """2 ** (scale - 127) in float32, for scale bytes 1 to 254; byte 0, a subnormal, gives zero."""
    return jax.lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)


def dequantize(packed: MXFP4, dtype: Any = jnp.float32) -> Float[Array, "*rows K"]:
    """The values of a packed array.

    Exact in float32 and bfloat16 as long as the result is a normal number of that type: beyond, it is infinite or,
    where the backend flushes subnormals (XLA on CPU and TPU), zero.

    Example:
        >>> packed = MXFP4(jnp.full((1, 16), 0x1A, jnp.uint8), jnp.array([130], jnp.uint8))
        >>> dequantize(packed)[:2].tolist()
        [-8.0, 4.0]
    """
    values = code_to_float(unpack(packed.blocks)).reshape(*packed.scales.shape, BLOCK)
    # In two factors, since 2.0 under scale byte 0 is a normal number though the scale itself is not.
    halved = values * jnp.where(packed.scales == 0, 0.5, 1.0)[..., None]
    scale = scale_to_float(jnp.maximum(packed.scales, 1))
    return (halved * scale[..., None]).reshape(packed.shape).astype(dtype)


def quantize(values: Float[Array, "*rows K"]) -> MXFP4:
    """Quantize to MXFP4 along the last dim, a multiple of 32 (OCP MX v1.0, section 6.3).

    The shared exponent is that of the block's largest magnitude, less 2; the values are rounded to the nearest e2m1
    number, ties to the even code, and saturate at 6. Values must be finite: `refuse_nonfinite` checks on the host.

    Example:
        >>> dequantize(quantize(jnp.linspace(0.0, 6.0, 32)))[-4:].tolist()
        [6.0, 6.0, 6.0, 6.0]
    """
    if values.shape[-1] % BLOCK:
        raise ValueError(f"last dim {values.shape[-1]} of {values.shape} is no multiple of {BLOCK}: pad it first")
    grouped = values.astype(jnp.float32).reshape(*values.shape[:-1], -1, BLOCK)
    largest = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(grouped), axis=-1), jnp.uint32)
    biased_exponent = (largest >> 23).astype(jnp.int32)  # 127 + floor(log2(largest)); 0 for zero and subnormals
    scales = jnp.maximum(biased_exponent - _LARGEST_EXPONENT, 0)
    inverse = jax.lax.bitcast_convert_type((2 * _SCALE_BIAS - scales) << 23, jnp.float32)
    scaled = grouped * inverse[..., None]
    magnitude = jnp.abs(scaled)
    # The grid's step doubles at 2 and at 4; jnp.round takes ties to even, which on each stretch is the even code.
    code = jnp.where(
        magnitude < 2,
        jnp.round(magnitude * 2),
        jnp.where(magnitude < 4, 2 + jnp.round(magnitude), 4 + jnp.round(magnitude / 2)),
    )
    code = jnp.minimum(code, 7).astype(jnp.uint8) | (jnp.signbit(scaled).astype(jnp.uint8) << 3)
    return MXFP4(pack(code.reshape(values.shape)), scales.astype(jnp.uint8))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def straight_through(values: Float[Array, "*rows K"], dtype: Any = jnp.float32) -> Float[Array, "*rows K"]:
    """The values as they would be once quantized; the gradient passes as if they were not (arXiv 1308.3432).

    Example:
        >>> values = jnp.linspace(0.1, 6.0, 32)
        >>> straight_through(values)[-3:].tolist(), jax.grad(lambda v: straight_through(v)[5])(values)[4:7].tolist()
        ([6.0, 6.0, 6.0], [0.0, 1.0, 0.0])
    """
    return dequantize(quantize(values), dtype)


def _straight_through_forward(values: Array, dtype: Any) -> tuple[Array, Array]:
    return straight_through(values, dtype), jnp.zeros_like(values, shape=())


def _straight_through_backward(dtype: Any, like: Array, gradient: Array) -> tuple[Array]:
    return (gradient.astype(like.dtype),)


straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def refuse_invalid_scales(scales: np.ndarray) -> None:
    """Raise InvalidScale, naming the first place, if any scale byte is 255 (on the host)."""
    if scales.size and scales.max() == NAN_SCALE:
        place = tuple(int(index) for index in np.argwhere(scales == NAN_SCALE)[0])
        raise InvalidScale(f"scale byte {NAN_SCALE} (NaN) at index {place}")


def refuse_nonfinite(values: np.ndarray) -> None:
    """Raise ValueError, naming the first place, if any value is infinite or NaN (on the host)."""
    finite = np.isfinite(values)
    if not finite.all():
        place = tuple(int(index) for index in np.argwhere(~finite)[0])
        raise ValueError(f"value {values[place]} at index {place} cannot be quantized")
