"""Expert weights as the TPU kernels read them: words of eight codes, columns of the matrix along the lanes.

A 32-bit word holds the codes of eight values of one column, in four pairs: pair p of word 8v + r has values
64v + 16p + 2r and the next one, in its lower and upper half. So the words of one vector register (8 sublanes by 128
lanes) unpack, with masks and shifts of 32-bit words that every TPU generation has, to four registers of bfloat16
(16 by 128) that hold 64 values of each column in their own order, and the activations need no permutation.

In each half of a word the codes of the four pairs lie where few operations bring them to bfloat16's sign (bit 15) and
to the bottom of its exponent and the top of its mantissa (bits 8 to 6): see `PAIRS`. Adding the block's scale to the
exponent makes the value. That is right for all magnitudes but e2m1's subnormals: 0.5 would be 0.75 and 0 would be 0.5.
So the codes of 0 and 0.5 are exchanged here: 0.5 is right as it is, and 0 is cleared by a mask.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped, UInt8

from pallas_kernels.experts.weights import ExpertWeights, refuse_odd_widths
from pallas_kernels.mxfp4 import BLOCK, MXFP4

STEP = 64
"""Values of a column in one register of words; D and F are multiples of it."""
STEP_WORDS = 8
LANES = 128
LARGEST_SCALE = 252
"""Of 6 = 1.5 * 4 the exponent field is scale + 2, and bfloat16's largest is 254."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Where a half of a word holds one of its four codes."""

    magnitude: int
    """The lowest of its three bits."""
    sign: int


PAIRS = (Pair(magnitude=6, sign=15), Pair(magnitude=3, sign=13), Pair(magnitude=0, sign=9), Pair(magnitude=10, sign=14))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TPUExperts:
    """One layer's experts in words. Gates and ups are apart, gates first."""

    gate_up_words: Any
    """int32 `E 2 D/8 F`; here and below the last dim ends in zeros that make it a multiple of 128.

    Memory has them in any case; without them XLA may make the experts the last dim, and copy the array for a kernel.
    """
    gate_up_scales: Any
    """int32 `E 2 words F`, words = `scale_words(D)`: byte b of word w has the published scale of block b * words + w,
    less 1, which is the exponent field of 0.5."""
    gate_up_bias: Any
    """float32 `E 2 F`."""
    down_words: Any
    """int32 `E F/8 D`."""
    down_scales: Any
    """int32 `E words D`, words = `scale_words(F)`."""
    down_bias: Any
    """float32 `E 1 D`."""

    @property
    def num_experts(self) -> int:
        """Experts held here."""
        return self.down_bias.shape[0]

    @property
    def width(self) -> int:
        """D, the model's width."""
        return self.gate_up_words.shape[-2] * 8

    @property
    def expert_width(self) -> int:
        """F, the experts' width."""
        return self.down_words.shape[-2] * 8


def pack(weights: ExpertWeights) -> TPUExperts:
    """Bring one layer's experts into words, one expert at a time, so that little memory is needed beside the result.

    Values that are no normal bfloat16 (below 2^-126, which only scale bytes 0 and 1 can give) become zero. Raises
    Unsupported unless D and F are multiples of 64. Scales are not looked at: see `weights.refuse_large_scales`.

    Example:
        >>> import pallas_kernels.mxfp4 as mxfp4
        >>> def matrix(rows, columns):
        ...     return mxfp4.quantize(jnp.ones((3, rows, columns)))
        >>> published = ExpertWeights(matrix(256, 64), jnp.ones((3, 256)), matrix(64, 128), jnp.ones((3, 64)))
        >>> packed = pack(published)
        >>> packed.gate_up_words.shape, packed.gate_up_scales.shape, packed.down_words.shape
        ((3, 2, 8, 128), (3, 2, 8, 128), (3, 16, 128))
    """
    refuse_odd_widths(weights, STEP)

    def one_expert(matrices: tuple[MXFP4, MXFP4]) -> tuple[Array, ...]:
        gate_up, down = matrices
        halves = [_pack(MXFP4(gate_up.blocks[half::2], gate_up.scales[half::2])) for half in (0, 1)]
        words, scales = (jnp.stack(parts) for parts in zip(*halves, strict=True))
        return words, scales, *_pack(down)

    gate_up_words, gate_up_scales, down_words, down_scales = jax.lax.map(one_expert, (weights.gate_up, weights.down))
    gate_up_bias = weights.gate_up_bias.astype(jnp.float32)
    return TPUExperts(
        gate_up_words=gate_up_words,
        gate_up_scales=gate_up_scales,
        gate_up_bias=_pad_columns(gate_up_bias.reshape(*gate_up_bias.shape[:-1], -1, 2).swapaxes(-1, -2)),
        down_words=down_words,
        down_scales=down_scales,
        down_bias=_pad_columns(weights.down_bias.astype(jnp.float32)[:, None]),
    )


def scale_words(depth: int) -> int:
    """Rows of words that hold the scales of a matrix of so many rows, in whole registers.

    With fewer, XLA would choose another order of dims for the array in memory, and copy it before each kernel.

    Example:
        >>> scale_words(2880)
        24
    """
    num_words = -(-depth // (4 * BLOCK))
    return -(-num_words // STEP_WORDS) * STEP_WORDS


def spread_scales(scales: Int32[Array, "*rows words n"], index: int) -> Int32[Array, "*rows words n"]:
    """The scales in byte `index` of each word, each where the exponents of both bfloat16s of a word are."""
    scale = jax.lax.shift_right_logical(scales, 8 * index) & 255
    return scale << 7 | scale << 23


def unpack_words(
    words: Int32[Array, "*rows m n"],
    first_scales: Int32[Array, "*rows #m n"],
    second_scales: Int32[Array, "*rows #m n"],
) -> list[Int32[Array, "*rows m n"]]:
    """The values of each of the four pairs, as two bfloat16 in a word; a scale, from `spread_scales`, for two pairs."""
    right = jax.lax.shift_right_logical
    nonzero = right(words, 1) | right(words, 2) | ~words  # at each magnitude's lowest bit
    values = []
    for index, pair in enumerate(PAIRS):
        magnitude = _shift_left(words, 6 - pair.magnitude)
        sign = _shift_left(words, 15 - pair.sign)
        if pair.magnitude - 6 == pair.sign - 15:
            bits = magnitude & _both(0x81C0)
        else:
            bits = (magnitude & _both(0x01C0)) | (sign & _both(0x8000))
        one_bit = right(nonzero, pair.magnitude) & _both(1)
        mask = (one_bit << 16) - one_bit
        values.append((bits + (first_scales if index < 2 else second_scales)) & mask)
    return values


def dequantize(
    words: Int32[Array, "*rows words N"], scales: Int32[Array, "*rows scale_words N"]
) -> Float[Array, "*rows K N"]:
    """The values in float32, [in, out], zeros at the end of `out` included: what the kernels multiply with."""
    *rows, num_words, num_columns = words.shape
    steps = words.reshape(*rows, -1, STEP_WORDS, num_columns)
    bases = jnp.concatenate([spread_scales(scales, index) for index in range(4)], axis=-2)
    bases = bases[..., : num_words // 4, :].reshape(*rows, -1, 2, 1, num_columns)
    pairs = jnp.stack(unpack_words(steps, bases[..., 0, :, :], bases[..., 1, :, :]), axis=-3)  # ... v p r N
    halves = jax.lax.bitcast_convert_type(pairs, jnp.bfloat16)  # ... v p r N h
    return jnp.moveaxis(halves, -1, -2).reshape(*rows, num_words * 8, num_columns).astype(jnp.float32)


def _shift_left(words: Int32[Array, "*dims"], amount: int) -> Int32[Array, "*dims"]:
    return words << amount if amount >= 0 else jax.lax.shift_right_logical(words, -amount)


def _both(half: int) -> Array:
    """A constant with the same 16 bits in both halves."""
    word = half | half << 16
    return jnp.int32(word - (1 << 32) if word >> 31 else word)


def _pack(matrix: MXFP4) -> tuple[Int32[Array, "words padded"], Int32[Array, "scale_words padded"]]:
    """The words and the scales of one matrix [out, in]."""
    num_columns = matrix.scales.shape[0]
    # Values 64v + 16p + 2r and the next are byte 32v + 8p + r of the published row.
    blocks = jnp.where(matrix.scales[..., None] == 0, jnp.uint8(0), matrix.blocks)
    pairs = blocks.reshape(num_columns, -1, 4, STEP_WORDS).transpose(2, 1, 3, 0).reshape(4, -1, num_columns)
    words = sum((_place(byte, pair) for byte, pair in zip(pairs, PAIRS, strict=True)), start=jnp.zeros((), jnp.uint32))
    scales = (jnp.maximum(matrix.scales, 1) - jnp.uint8(1)).T
    num_planes = 4 * scale_words(scales.shape[0] * BLOCK)
    planes = jnp.pad(scales, ((0, num_planes - scales.shape[0]), (0, 0))).reshape(4, -1, num_columns)
    packed_scales = jax.lax.bitcast_convert_type(jnp.moveaxis(planes, 0, -1), jnp.int32)
    return _pad_columns(jax.lax.bitcast_convert_type(words, jnp.int32)), _pad_columns(packed_scales)


def _pad_columns(array: Shaped[Array, "*rows N"]) -> Shaped[Array, "*rows padded"]:
    return jnp.pad(array, ((0, 0),) * (array.ndim - 1) + ((0, -array.shape[-1] % LANES),))


def _place(byte: UInt8[Array, "words N"], pair: Pair) -> Array:
    """The codes of a byte in the two halves of a word."""
    code = (byte & 15).astype(jnp.uint32) | (byte >> 4).astype(jnp.uint32) << 16
    magnitude, sign = code & 0x00070007, code >> 3 & 0x00010001
    subnormal = ~(magnitude >> 1 | magnitude >> 2) & 0x00010001
    return (magnitude ^ subnormal) << pair.magnitude | sign << pair.sign
