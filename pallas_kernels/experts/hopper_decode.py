"""The expert layer on Hopper GPUs for few tokens: bound by the bytes of the experts touched, two kernels.

The first multiplies by gate and up and applies SwiGLU, the second multiplies by down and the routing weights; the sum
over a token's experts is left to whatever XLA fuses it with. Nothing is sorted or gathered between them.

Both are inline PTX as a whole, which the interpreter does not know: a CPU checks and lowers, only a GPU multiplies.
"""

from collections.abc import Sequence

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, BFloat16, Float, Int, UInt32

from pallas_kernels import hopper
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.exchange import Parts
from pallas_kernels.experts import tiles as table
from pallas_kernels.experts.hopper_layout import TILE, HopperExperts
from pallas_kernels.experts.hopper_operands import COLUMN_BLOCK, STRIPS_PER_TILE, Product
from pallas_kernels.experts.hopper_schedule import Rows, Schedule
from pallas_kernels.experts.hopper_stream import STRIP_ROWS, Finish, Stream, Strip
from pallas_kernels.experts.tiles import DecodeTiles
from pallas_kernels.hopper import Value, f32
from pallas_kernels.hopper_card import LOG2_E
from pallas_kernels.hopper_words import WARP, Condition, Word, pointer, store, thread

MAX_TOKENS = 128
MAX_PER_TOKEN = 8
MAX_COLUMNS = 32
MAX_WARPGROUPS = 4
"""Six, with fewer registers each, were slower throughout."""
_WARPS_PER_GROUP = 4


Chosen = tuple[Int[Array, " M"]] | tuple[Int[Array, " M"], Int[Array, " 1"]]
"""The expert of each row, and which number the first expert here has; without it, 0."""


def experts(
    x: Float[Array, "T D"],
    weights: HopperExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    alpha: float,
    limit: float,
    tiles: DecodeTiles | None = None,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.experts.experts`: `expert_parts` and their sum."""
    parts = expert_parts(x, weights, expert_ids, routing, alpha=alpha, limit=limit, tiles=tiles)
    return parts.total().astype(x.dtype)


def expert_parts(
    x: Float[Array, "T D"],
    weights: HopperExperts,
    expert_ids: Int[Array, "T A"],
    routing: Float[Array, "T A"],
    *,
    alpha: float,
    limit: float,
    first_expert: Int[Array, " 1"] | None = None,
    total_experts: int | None = None,
    tiles: DecodeTiles | None = None,
) -> Parts:
    """See `pallas_kernels.experts.expert_parts`; for up to 128 tokens of bfloat16, best for up to 8 rows an expert on
    average, beyond which `experts.hopper` takes the other form. `tiles`: those of the table by default.

    The activation between the two products is rounded to bfloat16; everything else stays in float32.

    Raises Unsupported for other numbers of tokens, experts per token, types or widths, and for tiles that do not fit.
    """
    num_tokens, per_token = expert_ids.shape
    _check(x, weights, num_tokens=num_tokens, per_token=per_token)
    tiles = tiles or table.decode(num_tokens * per_token, total_experts or weights.num_experts)
    ids = expert_ids.reshape(-1).astype(jnp.int32)
    chosen = (ids,) if first_expert is None else (ids, first_expert)
    activation = gate_up(
        x,
        weights.gate_up_words,
        weights.gate_up_scales,
        weights.gate_up_bias,
        chosen,
        alpha=alpha,
        limit=limit,
        tiles=tiles,
    )
    y = down(
        activation,
        weights.down_words,
        weights.down_scales,
        weights.down_bias,
        chosen,
        routing.reshape(-1).astype(jnp.float32),
        tiles=tiles,
    )
    parts = y.reshape(num_tokens, per_token, -1)
    if total_experts == weights.num_experts:
        return Parts(parts)
    return Parts(parts, expert_ids, first_expert, count=weights.num_experts)


def _check(x: Array, weights: HopperExperts, *, num_tokens: int, per_token: int) -> None:
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise Unsupported(f"decode experts: {num_tokens} tokens, takes 1 to {MAX_TOKENS}")
    if not 1 <= per_token <= MAX_PER_TOKEN:
        raise Unsupported(f"decode experts: {per_token} experts per token, takes 1 to {MAX_PER_TOKEN}")
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"decode experts: x is {x.dtype}, takes bfloat16")
    if weights.width % TILE or weights.expert_width % TILE:
        raise Unsupported(f"decode experts: D = {weights.width}, F = {weights.expert_width}, takes multiples of {TILE}")


def _check_tiles(tiles: DecodeTiles) -> None:
    if tiles.columns not in range(COLUMN_BLOCK, MAX_COLUMNS + 1, COLUMN_BLOCK):
        raise Unsupported(f"decode experts: {tiles}, takes multiples of {COLUMN_BLOCK} columns up to {MAX_COLUMNS}")
    if tiles.strips not in (1, 2):
        raise Unsupported(f"decode experts: {tiles}, takes 1 or 2 strips")
    if not 1 <= tiles.warpgroups <= MAX_WARPGROUPS:
        raise Unsupported(f"decode experts: {tiles}, takes 1 to {MAX_WARPGROUPS} warpgroups")
    if tiles.num_blocks * tiles.strips % STRIPS_PER_TILE:
        raise Unsupported(f"decode experts: {tiles}, takes blocks that share the {STRIPS_PER_TILE} strips of a tile")


def gate_up(
    x: BFloat16[Array, "T D"],
    words: UInt32[Array, "E n k 512"],
    scales: UInt32[Array, "E n k 32"],
    bias: Float[Array, "E rows"],
    chosen: Chosen,
    *,
    alpha: float,
    limit: float,
    tiles: DecodeTiles,
) -> BFloat16[Array, "M F"]:
    """SwiGLU of gate and up for every (token, expert) pair, a row each; rows of foreign ids are not written."""
    num_rows = chosen[0].shape[0]
    product = _product(words, num_rows, tiles, rows_per_input=num_rows // x.shape[0])
    expert_width = bias.shape[1] // 2

    def finish(bias_ref: Value, out_ref: Value) -> Finish:
        return _SwiGLU(bias_ref, out_ref, expert_width=expert_width, alpha=alpha, limit=limit)

    out = jax.ShapeDtypeStruct((num_rows, expert_width), jnp.bfloat16)
    return _call("experts_gate_up", product, finish, out, chosen, x, words, scales, bias)


def down(
    activation: BFloat16[Array, "M F"],
    words: UInt32[Array, "E n k 512"],
    scales: UInt32[Array, "E n k 32"],
    bias: Float[Array, "E D"],
    chosen: Chosen,
    routing: Float[Array, " M"],
    *,
    tiles: DecodeTiles,
) -> Float[Array, "M D"]:
    """The second product and its bias, times routing, a row per pair; rows of foreign ids are not written."""
    product = _product(words, chosen[0].shape[0], tiles, rows_per_input=1)
    width = bias.shape[1]

    def finish(bias_ref: Value, routing_ref: Value, out_ref: Value) -> Finish:
        return _Weighted(bias_ref, routing_ref, out_ref, width=width)

    out = jax.ShapeDtypeStruct((chosen[0].shape[0], width), jnp.float32)
    return _call("experts_down", product, finish, out, chosen, activation, words, scales, bias, routing)


def _product(words: Array, num_rows: int, tiles: DecodeTiles, *, rows_per_input: int) -> Product:
    num_experts, row_tiles, k_tiles, _ = words.shape
    _check_tiles(tiles)
    rows = Rows(num_experts, num_rows, tiles.columns, num_warps=tiles.warpgroups * _WARPS_PER_GROUP)
    return Product(
        rows,
        row_tiles=row_tiles,
        k_tiles=k_tiles,
        rows_per_input=rows_per_input,
        strips=tiles.strips,
        scale_sums=tiles.scale_sums,
        num_blocks=tiles.num_blocks,
    )


def _call(name: str, product: Product, finish, out: jax.ShapeDtypeStruct, chosen: Chosen, *operands: Array) -> Array:
    """Run one product; `operands` are inputs, words, scales and then what `finish` takes before the output."""

    def body(*refs) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def stream(_, *refs: Value) -> None:
            inputs, words, scales, *rest, scratch, partials = refs[len(chosen) :]
            schedule = Schedule(product.rows, refs[: len(chosen)], scratch)
            Stream(product, finish(*rest), schedule, partials).run(inputs, words, scales)

        stream(*refs)

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(product.num_blocks,),
        grid_names=("block",),
        num_threads=product.rows.num_warps // _WARPS_PER_GROUP,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((product.rows.shared_words,), jnp.uint32),
            plgpu.SMEM((product.partial_floats,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*chosen, *operands)


def _lane_row() -> Word:
    """g, the lane's row among a strip's first or last eight."""
    return thread() % WARP // 4


def _load_float(base: Value, index: Word) -> Value:
    return arith.bitcast(f32(), hopper.load_word(pointer(base, index, 4), hint="nc."))


class _SwiGLU:
    """Gate in the strip's first eight rows, up in the last: see `hopper_layout.pack` for which value they are of."""

    floats_per_row = 0

    def __init__(self, bias: Value, out: Value, *, expert_width: int, alpha: float, limit: float):
        self._bias = hopper.address(bias)
        self._out = hopper.address(out)
        self._expert_width = expert_width
        self._alpha = alpha
        self._limit = limit

    def per_row(self, row: Word) -> list[Value]:
        return []

    def per_strip(self, strip: Strip) -> list[Value]:
        row = strip.expert * (2 * self._expert_width) + strip.tile * TILE + strip.part * STRIP_ROWS + _lane_row()
        return [_load_float(self._bias, row), _load_float(self._bias, row + STRIP_ROWS // 2)]

    def write(
        self,
        strip: Strip,
        loaded: Sequence[Value],
        row: Word,
        per_row: Sequence[Value],
        sums: tuple[Value, Value],
        *,
        only: Condition,
    ) -> None:
        gate, up = (arith.addf(value, bias) for value, bias in zip(sums, loaded, strict=True))
        activated = _swiglu(gate, up, alpha=self._alpha, limit=self._limit)
        code = "cvt.rn.bf16x2.f32 $0, 0f00000000, $1;"
        rounded = hopper.assembly([hopper.i32()], [activated], code, "=r,f", effect=False)[0]
        lane_row = _lane_row()
        place = strip.tile * (TILE // 2) + lane_row // 2 * 8 + strip.part * 2 + lane_row % 2
        store(pointer(self._out, row * self._expert_width + place, 2), rounded, "b16", only=only)


class _Weighted:
    """Sums plus bias, times the row's routing weight."""

    floats_per_row = 1

    def __init__(self, bias: Value, routing: Value, out: Value, *, width: int):
        self._bias = hopper.address(bias)
        self._routing = hopper.address(routing)
        self._out = hopper.address(out)
        self._width = width

    def per_row(self, row: Word) -> list[Value]:
        return [_load_float(self._routing, row)]

    def per_strip(self, strip: Strip) -> list[Value]:
        row = strip.expert * self._width + self._place(strip)
        return [_load_float(self._bias, row), _load_float(self._bias, row + STRIP_ROWS // 2)]

    def _place(self, strip: Strip) -> Word:
        return strip.tile * TILE + strip.part * STRIP_ROWS + _lane_row()

    def write(
        self,
        strip: Strip,
        loaded: Sequence[Value],
        row: Word,
        per_row: Sequence[Value],
        sums: tuple[Value, Value],
        *,
        only: Condition,
    ) -> None:
        place = row * self._width + self._place(strip)
        for half, (value, bias) in enumerate(zip(sums, loaded, strict=True)):
            weighted = arith.mulf(arith.addf(value, bias), per_row[0])
            store(pointer(self._out, place + half * (STRIP_ROWS // 2), 4), weighted, "f32", only=only)


def _swiglu(gate: Value, up: Value, *, alpha: float, limit: float) -> Value:
    """`pallas_kernels.experts.reference.swiglu` of one pair."""

    def c(value: float) -> Value:
        return mgpu.c(value, f32())

    def approximately(instruction: str, operand: Value) -> Value:
        return hopper.assembly([f32()], [operand], f"{instruction}.approx.ftz.f32 $0, $1;", "=f,f", effect=False)[0]

    gate = arith.minnumf(gate, c(limit))
    up = arith.maxnumf(arith.minnumf(up, c(limit)), c(-limit))
    exponential = approximately("ex2", arith.mulf(gate, c(-alpha * LOG2_E)))
    sigmoid = approximately("rcp", arith.addf(exponential, c(1.0)))
    return arith.mulf(arith.mulf(gate, sigmoid), arith.addf(up, c(1.0)))
