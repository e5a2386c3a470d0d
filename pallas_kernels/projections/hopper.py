"""The projections on Hopper GPUs: which arguments the kernels take, and how their work is cut.

Weights are streamed as published; `product` and `vocabulary` say how. They take a few dozen tokens: beyond, XLA's
matrix products, which read the weights once for all tokens just the same, are as fast. What follows the product of
queries, keys and values is a kernel then too.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.exchange.mailbox import Mailbox
from pallas_kernels.hopper_card import NUM_MULTIPROCESSORS, SHARED_BYTES
from pallas_kernels.projections import append, reference, residual, routing, vocabulary
from pallas_kernels.projections import heads as heads_kernel
from pallas_kernels.projections.norm import SQUARES
from pallas_kernels.projections.places import HEAD_DIM
from pallas_kernels.projections.product import TILE_COLUMNS, UNIT_ROWS, Tiles
from pallas_kernels.projections.vocabulary import STRIP_ROWS, StreamTiles
from pallas_kernels.projections.weights import HeadWeights, joined

MAX_TOKENS = 32
"""Most rows of a kernel that multiplies with the weights of queries, keys and values, or of the output."""
MAX_ROUTED = 128
"""Most rows of a route kernel."""
MAX_UNEMBEDDED = 32
"""Most rows of an unembed kernel."""
MAX_EXPERTS = 256
_RESERVED_BYTES = 2048
"""Of them, what alignment and the compiler may take."""


def project_to_cache(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    heads: Sequence[HeadWeights],
    rotation: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    pages: Int[Array, " T"],
    slots: Int[Array, " T"],
    *,
    eps: float,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "P K slots W"], Float[Array, "P K slots W"]]:
    """See `pallas_kernels.projections.project_to_cache`. Beyond MAX_TOKENS the product is XLA's, and `tiles` unused."""
    name, (num_tokens, width) = "project_to_cache", x.shape
    all_heads = heads[0] if len(heads) == 1 else joined(*heads)
    num_heads, head_dim, _ = all_heads.weight.shape
    _check_dtypes(name, x, norm_scale, *all_heads, keys, values)
    cos, sin = rotation
    _check(name, cos.dtype == sin.dtype == jnp.float32, f"rotations of {cos.dtype} and {sin.dtype}, not float32")
    _check(name, pages.dtype == slots.dtype == jnp.int32, f"pages of {pages.dtype}, slots of {slots.dtype}, not int32")
    _check(name, head_dim == HEAD_DIM, f"heads of {head_dim}, not {HEAD_DIM}")
    _check(name, keys.shape[3] == HEAD_DIM, f"pools of width {keys.shape[3]}, not {HEAD_DIM}")
    _check(name, num_tokens > 0, "0 tokens, not 1 or more")
    if num_tokens > MAX_TOKENS:
        normed = reference.norm(x, norm_scale, eps=eps)
        product = reference.multiply(normed, all_heads.weight.reshape(-1, width))
        return append.append(product, all_heads.bias, rotation, keys, values, pages, slots)
    _check_sizes(name, num_tokens, width, MAX_TOKENS)
    num_units = num_heads * heads_kernel.UNITS_PER_HEAD
    if tiles is None:
        warps, depth = (12, 2) if num_tokens <= 8 else (8, 3) if num_tokens <= 16 else (8, 2)
        tiles = Tiles(_units(num_units), warps, depth)
    _check(name, num_units % tiles.units == 0, f"{num_units} units of rows in blocks of {tiles.units}")
    num_blocks = num_units // tiles.units
    _check(name, num_blocks % tiles.sharers == 0, f"{num_blocks} blocks in clusters of {tiles.sharers}")
    num_words = tiles.part_floats(num_tokens) + (SQUARES + tiles.rows + tiles.rows // 2) * num_tokens
    _check_shared(name, 4 * num_words + 2 * width)
    places = (keys, values, pages, slots)
    return heads_kernel.project_to_cache(x, norm_scale, all_heads, rotation, *places, eps=eps, tiles=tiles)


def output(
    attended: Float[Array, "T N H"],
    weight: Float[Array, "D N H"],
    bias: Float[Array, " D"],
    residual_stream: Float[Array, "T D"],
    mailbox: Mailbox | None = None,
    *,
    num_devices: int = 1,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "T D"], Mailbox | None]:
    """See `pallas_kernels.projections.output`: on several devices, with a mailbox that holds the rows."""
    name, (num_tokens, width) = "output", residual_stream.shape
    num_columns = attended.shape[1] * attended.shape[2]
    _check_dtypes(name, attended, weight, bias, residual_stream)
    _check_sizes(name, num_tokens, num_columns, MAX_TOKENS)
    _check(name, width % UNIT_ROWS == 0, f"a width of {width}, not a multiple of {UNIT_ROWS}")
    if tiles is None:
        warps, depth = (16, 2) if num_tokens <= 32 else (8, 3)
        tiles = Tiles(_units(width // UNIT_ROWS), warps, depth)
    _check(name, width % tiles.rows == 0, f"a width of {width} in blocks of {tiles.rows}")
    _check_shared(name, 4 * (tiles.part_floats(num_tokens) + num_tokens * tiles.rows))
    return residual.output(attended, weight, bias, residual_stream, mailbox, tiles=tiles, num_devices=num_devices)


def route(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    router_weight: Float[Array, "E D"],
    router_bias: Float[Array, " E"],
    *,
    eps: float,
    experts_per_token: int,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "T D"], Int[Array, "T A"], Float[Array, "T A"]]:
    """See `pallas_kernels.projections.route`."""
    name, (num_tokens, width), num_experts = "route", x.shape, router_weight.shape[0]
    _check_dtypes(name, x, norm_scale, router_weight, router_bias)
    _check_sizes(name, num_tokens, width, MAX_ROUTED)
    _check(name, num_experts % UNIT_ROWS == 0, f"{num_experts} experts, not a multiple of {UNIT_ROWS}")
    _check(name, num_experts <= MAX_EXPERTS, f"{num_experts} experts, more than {MAX_EXPERTS}")
    most = min(num_experts, 32)
    _check(name, 0 < experts_per_token <= most, f"{experts_per_token} experts per token, not 1 to {most}")
    if tiles is None:
        num_units = num_experts // UNIT_ROWS
        members = max(count for count in range(1, routing.MAX_CLUSTER + 1) if num_units % count == 0)
        tiles = Tiles(num_units // members, 12, max(1, min(4, 8 * members // num_units)))
    fits = num_experts % tiles.rows == 0 and num_experts // tiles.rows <= routing.MAX_CLUSTER
    _check(name, fits, f"{num_experts} experts in blocks of {tiles.rows}, at most {routing.MAX_CLUSTER} a cluster")
    tokens = min(num_tokens, routing.GROUP_TOKENS)
    _check_shared(name, 4 * tokens * (tiles.part_floats(1) + SQUARES + num_experts) + 2 * width)
    normed, expert_ids, shares = routing.route(
        x, norm_scale, router_weight, router_bias, eps=eps, experts_per_token=experts_per_token, tiles=tiles
    )
    return normed, expert_ids, shares


def unembed(
    x: Float[Array, "T D"],
    norm_scale: Float[Array, " D"],
    weight: Float[Array, "V D"],
    *,
    eps: float,
    tiles: StreamTiles | None = None,
) -> Float[Array, "T V"]:
    """See `pallas_kernels.projections.unembed`."""
    name, (num_tokens, width), num_rows = "unembed", x.shape, weight.shape[0]
    _check_dtypes(name, x, norm_scale, weight)
    _check_sizes(name, num_tokens, width, MAX_UNEMBEDDED)
    _check(name, num_rows % STRIP_ROWS == 0, f"a vocabulary of {num_rows}, not a multiple of {STRIP_ROWS}")
    _check_shared(name, num_tokens * vocabulary.row_bytes(width))
    if tiles is None:
        tiles = StreamTiles(NUM_MULTIPROCESSORS, 12, 5 if num_tokens <= 8 else 4)
    return vocabulary.unembed(x, norm_scale, weight, eps=eps, tiles=tiles)


def _units(num_units: int) -> int:
    """Units per block, so that the processor with most of them has as few as can be; the larger blocks of equals."""

    def most_on_one(units: int) -> int:
        return -(-num_units // (units * NUM_MULTIPROCESSORS)) * units

    choices = [units for units in range(1, 7) if num_units % units == 0]
    return min(choices, key=lambda units: (most_on_one(units), -units))


def _check(name: str, holds: bool, otherwise: str) -> None:
    if not holds:
        raise Unsupported(f"{name}: {otherwise}")


def _check_dtypes(name: str, *arrays: Array) -> None:
    dtypes = sorted({str(array.dtype) for array in arrays})
    _check(name, dtypes == ["bfloat16"], f"arrays of {', '.join(dtypes)}, not bfloat16")


def _check_sizes(name: str, num_tokens: int, num_columns: int, most: int) -> None:
    _check(name, 0 < num_tokens <= most, f"{num_tokens} tokens, not 1 to {most}")
    divides = num_columns % TILE_COLUMNS == 0
    _check(name, divides, f"{num_columns} columns, not a multiple of {TILE_COLUMNS}")


def _check_shared(name: str, num_bytes: int) -> None:
    most = SHARED_BYTES - _RESERVED_BYTES
    _check(name, num_bytes <= most, f"{num_bytes} bytes of shared memory, more than {most}")
