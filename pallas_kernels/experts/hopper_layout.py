"""Expert weights as the Hopper kernels read them: tiles of 64 rows by 64 columns in the order of the tensor cores.

A tile is 128 threads times 16 bytes; its kernel loads those bytes and has, after masks and shifts, the thread's part
of wgmma's and mma.m16n8k16's A operand (PTX ISA, "Matrix fragments for mma.m16n8k16"). Thread 32w + 4g + t (warp w of
4, g of 8, t of 4) holds words 2c + r (c, r of 2): row 16w + 8r + g, and of the tile's columns the eight that the mma
calls 32c + 8j + 2t + p (j of 4, p of 2). Which actual column that is, is ours to choose: 32c + 8t + 2j + p, so that a
thread's eight are the published four bytes, and that a thread's part of the B operand is contiguous in memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt8, UInt32

from pallas_kernels.experts.weights import ExpertWeights, refuse_odd_widths
from pallas_kernels.mxfp4 import BLOCK, MXFP4, code_to_float, scale_to_float

TILE = 64
"""Rows and columns of a tile."""
TILE_WORDS = 512
TILE_SCALES = 32
LARGEST_SCALE = 128
"""The kernels multiply by 2 ** (scale - 1), whose bfloat16 exponent field is scale + 126: 129 would be infinity."""
_SCALE_OFFSET = 126
PART_WIDTH = 192
"""Parts of an expert's width are multiples of it: three warpgroups' rows of gate or up, three K tiles of down."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HopperExperts:
    """One layer's experts in tiles. Rows of gate and up: see `pack`; rows of down are in their own order."""

    gate_up_words: Any
    """uint32 `E 2F/64 D/64 512`."""
    gate_up_scales: Any
    """uint32 `E 2F/64 D/64 32`: word 8w + g has, in byte 2c + r, scale + 126 of row 16w + 8r + g, columns 32c..+31."""
    gate_up_bias: Any
    """float32 `E 2F`, in the order of the packed rows."""
    down_words: Any
    """uint32 `E D/64 F/64 512`."""
    down_scales: Any
    """uint32 `E D/64 F/64 32`."""
    down_bias: Any
    """float32 `E D`; of experts cut over devices, each device's share."""

    @classmethod
    def dims(cls) -> "HopperExperts":
        """The dims of each array by letter: E experts and F along an expert's width, which may both be split."""
        return cls("E F k words", "E F k scales", "E F", "E n F words", "E n F scales", "E D")

    @property
    def num_experts(self) -> int:
        """Experts held here."""
        return self.down_bias.shape[0]

    @property
    def width(self) -> int:
        """D, the model's width."""
        return self.down_bias.shape[1]

    @property
    def expert_width(self) -> int:
        """F, the experts' width."""
        return self.gate_up_bias.shape[1] // 2


def prepare(weights: ExpertWeights, *, axis: str | None = None) -> HopperExperts:
    """`pack`, and where `axis` is a mesh axis of several devices, that hold different experts, hand each device its
    part of the width of all their experts: padded with zeros to whole tiles, the bias of down shared out evenly."""
    num_parts = jax.lax.axis_size(axis) if axis else 1
    if num_parts == 1:
        return pack(weights)
    packed = pack(padded(weights, PART_WIDTH * num_parts))

    def cut(dims: str, array: Array) -> Array:
        if "F" not in dims.split():
            return jax.lax.all_gather(array, axis, tiled=True) / num_parts
        return jax.lax.all_to_all(array, axis, split_axis=dims.split().index("F"), concat_axis=0, tiled=True)

    return jax.tree.map(cut, HopperExperts.dims(), packed)


def padded(weights: ExpertWeights, multiple: int) -> ExpertWeights:
    """Experts of a width that is such a multiple: the values that are added are zeros, and what they lead to is."""
    extra = -weights.down.shape[-1] % multiple

    def pad(array: Array, dim: int, count: int) -> Array:
        return jnp.pad(array, [(0, count if index == dim else 0) for index in range(array.ndim)])

    return ExpertWeights(
        gate_up=MXFP4(*(pad(part, 1, 2 * extra) for part in (weights.gate_up.blocks, weights.gate_up.scales))),
        gate_up_bias=pad(weights.gate_up_bias, 1, 2 * extra),
        down=MXFP4(*(pad(part, 2, extra // BLOCK) for part in (weights.down.blocks, weights.down.scales))),
        down_bias=weights.down_bias,
    )


def pack(weights: ExpertWeights) -> HopperExperts:
    """Bring one layer's experts into tiles; under jit this is a fusion or two per array.

    Tile n of gate_up covers values 32n to 32n + 31 of F, gates in the rows with r = 0 and ups in those with r = 1 of
    the same thread. Row 16w + 8r + g has value 32n + 8 * (g // 2) + 2w + g % 2: so 8w + g, the position in which the
    tile's results leave a kernel, is the place `to_mma_order` gives that value.

    Raises Unsupported unless D and F are multiples of 64. Scales are not looked at: see `weights.refuse_large_scales`.

    Example:
        >>> import pallas_kernels.mxfp4 as mxfp4
        >>> def matrix(rows, columns):
        ...     return mxfp4.quantize(jnp.ones((3, rows, columns)))
        >>> published = ExpertWeights(matrix(256, 64), jnp.ones((3, 256)), matrix(64, 128), jnp.ones((3, 64)))
        >>> packed = pack(published)
        >>> packed.gate_up_words.shape, packed.down_words.shape
        ((3, 4, 1, 512), (3, 1, 2, 512))
    """
    refuse_odd_widths(weights, TILE)
    return HopperExperts(
        gate_up_words=_pack_words(gate_up_rows(_block_words(weights.gate_up.blocks))),
        gate_up_scales=_pack_scales(gate_up_rows(weights.gate_up.scales)),
        gate_up_bias=_pack_bias(gate_up_rows(weights.gate_up_bias)),
        down_words=_pack_words(_down_rows(_block_words(weights.down.blocks))),
        down_scales=_pack_scales(_down_rows(weights.down.scales)),
        down_bias=_pack_bias(_down_rows(weights.down_bias)),
    )


def to_mma_order(x: Shaped[Array, "*rows K"]) -> Shaped[Array, "*rows K"]:
    """Reorder the last dim so that it meets the tiles' columns: place 32c + 8j + 2t + p gets 32c + 8t + 2j + p."""
    return _swap_pairs(x)


def from_mma_order(x: Shaped[Array, "*rows K"]) -> Shaped[Array, "*rows K"]:
    """The inverse of `to_mma_order`, which is the same exchange of j and t."""
    return _swap_pairs(x)


def dequantize(
    words: UInt32[Array, "*rows tiles 512"], scales: UInt32[Array, "*rows tiles 32"], dtype: Any = jnp.float32
) -> Float[Array, "*rows 64 K"]:
    """The values of a row of tiles, the last dim in mma order (`from_mma_order` undoes it).

    Plain arithmetic without array constants, so it runs inside an interpreted kernel as well; exact, and only
    scale bytes 1 to 128 are known.
    """
    *rows, tiles, _ = words.shape
    by_place = words.reshape(*rows, tiles, 4, 8, 4, 2, 2)  # ... tile w g t c r
    values = code_to_float(jnp.stack(_unpack_codes(by_place), axis=-1).astype(jnp.uint8))
    bytes_of = [(scales >> (8 * index)) & 255 for index in range(4)]
    scale_bytes = jnp.stack(bytes_of, axis=-1) - _SCALE_OFFSET
    scale = scale_to_float(scale_bytes.astype(jnp.uint8)).reshape(*rows, tiles, 4, 8, 1, 2, 2, 1)
    scaled = (values * scale).reshape(*rows, tiles, 4, 8, 4, 2, 2, 4, 2)  # ... tile w g t c r j p
    first = len(rows)
    order = [*range(first), *(first + place for place in (1, 5, 2, 0, 4, 6, 3, 7))]
    return scaled.transpose(order).reshape(*rows, TILE, tiles * TILE).astype(dtype)


def gate_up_rows(array: Array) -> Shaped[Array, "E n 4 2 8 *rest"]:
    """Rows as tile, w, r, g from the published order n, g // 2, w, g % 2, r."""
    num_experts, num_rows, *rest = array.shape
    split = jnp.moveaxis(array.reshape(num_experts, num_rows // TILE, 4, 4, 2, 2, *rest), (3, 5, 2, 4), (2, 3, 4, 5))
    return split.reshape(num_experts, num_rows // TILE, 4, 2, 8, *rest)


def _down_rows(array: Array) -> Shaped[Array, "E n 4 2 8 *rest"]:
    """Rows as tile, w, r, g, which is their own order."""
    num_experts, num_rows, *rest = array.shape
    return array.reshape(num_experts, num_rows // TILE, 4, 2, 8, *rest)


def _block_words(blocks: UInt8[Array, "E rows J 16"]) -> UInt32[Array, "E rows J 4"]:
    """Four bytes are one word of the result, but for the order of the bits."""
    return jax.lax.bitcast_convert_type(blocks.reshape(*blocks.shape[:-1], 4, 4), jnp.uint32)


def _pack_words(words: UInt32[Array, "E n 4 2 8 J 4"]) -> UInt32[Array, "E n k 512"]:
    num_experts, num_tiles, _, _, _, num_blocks, _ = words.shape
    packed = _arrange_bits(words).reshape(num_experts, num_tiles, 4, 2, 8, num_blocks // 2, 2, 4)  # E n w r g k c t
    return packed.transpose(0, 1, 5, 2, 4, 7, 6, 3).reshape(num_experts, num_tiles, num_blocks // 2, TILE_WORDS)


def _pack_scales(scales: UInt8[Array, "E n 4 2 8 J"]) -> UInt32[Array, "E n k 32"]:
    num_experts, num_tiles, _, _, _, num_blocks = scales.shape
    split = (scales + jnp.uint8(_SCALE_OFFSET)).reshape(num_experts, num_tiles, 4, 2, 8, num_blocks // 2, 2)
    quads = split.transpose(0, 1, 5, 2, 4, 6, 3).reshape(num_experts, num_tiles, num_blocks // 2, TILE_SCALES, 4)
    return jax.lax.bitcast_convert_type(quads, jnp.uint32)


def _pack_bias(bias: Shaped[Array, "E n 4 2 8"]) -> Float[Array, "E rows"]:
    return bias.reshape(bias.shape[0], -1).astype(jnp.float32)


def _arrange_bits(words: UInt32[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """Place the codes of four bytes so that few masks and shifts make each pair two bfloat16s.

    A bfloat16 wants the sign at bit 15 and the magnitude at bits 8 to 6. There they are, in either half of the word,
    for code 0; for code 1 once the word is shifted left by 6; for code 2 once it is rotated left by 12. Code 3 has
    what is left: its sign at bit 13 and its lower two bits at 5 and 4, to be shifted left by 2, and its highest bit
    at 14, to be shifted right by 6.
    """
    first, second, third, last = (
        ((words >> (8 * code)) & 0x0000000F) | (((words >> (8 * code + 4)) & 0x0000000F) << 16) for code in range(4)
    )
    return (
        _in_place(first)
        | (_in_place(second) >> 6)
        | _rotated(_in_place(third), 20)
        | ((last & 0x00080008) << 10)
        | ((last & 0x00040004) << 12)
        | ((last & 0x00030003) << 4)
    )


def _unpack_codes(words: UInt32[Array, "*dims"]) -> list[UInt32[Array, "*dims"]]:
    """The eight codes of a word, in the order of columns j, p: the inverse of `_arrange_bits`."""
    last = ((words >> 10) & 0x00080008) | ((words >> 12) & 0x00040004) | ((words >> 4) & 0x00030003)
    pairs = [_out_of_place(words), _out_of_place(words << 6), _out_of_place(_rotated(words, 12)), last]
    return [code for pair in pairs for code in (pair & 15, pair >> 16)]


def _in_place(pair: UInt32[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """Two codes where two bfloat16 have them."""
    return ((pair & 0x00080008) << 12) | ((pair & 0x00070007) << 6)


def _out_of_place(pair: UInt32[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    return ((pair >> 12) & 0x00080008) | ((pair >> 6) & 0x00070007)


def _rotated(words: UInt32[Array, "*dims"], amount: int) -> UInt32[Array, "*dims"]:
    """Rotated left."""
    return (words << amount) | (words >> (32 - amount))


def _swap_pairs(x: Array) -> Array:
    *rows, columns = x.shape
    pairs = x.reshape(*rows, columns // 32, 4, 4, 2)
    # Not a transposition: of parts so small XLA makes one 20 times slower than memory.
    return jnp.stack([pairs[..., j, :] for j in range(4)], axis=-3).reshape(x.shape)
