"""Attention of many tokens over pages on Hopper: wgmma tiles of 8 tokens x 8 query heads of one kv head.

The warpgroups of a block share the pages of one kv head, which a warpgroup of its own brings through a ring in shared
memory, and attend for one tile after the other. A step is two pages, or one where queries see few (windows). Within a
warpgroup the softmax of one step overlaps the products of the next and the previous one (Shah et al. 2024,
FlashAttention-3, arXiv 2407.08608). A row's running maximum starts from its sink, and its denominator from the sink's
weight, one.

Under the interpreter the products are plain JAX (`hopper_prefill_parts.interpreted`); the ring, its barriers and copies
are those of the hardware.
"""

import dataclasses
import functools
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import hopper_prefill_plan as planning
from pallas_kernels.attention.hopper_prefill_parts import WIDTH, Parts, hardware, interpreted
from pallas_kernels.attention.hopper_prefill_tiles import Tiles
from pallas_kernels.hopper_card import LOG2_E, NUM_MULTIPROCESSORS

GROUP = 8
SLOTS = 64
TOKENS = planning.WARPGROUP_TOKENS
ROWS_OF_TILE = TOKENS * GROUP
"""Of a warpgroup."""
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""One number per row of a tile."""
FEW_PAGES = 12
"""Up to so many, steps of two pages would mostly be edges: the windows of sliding layers."""
LOWEST_SINK = -1e30
"""Stands in for a sink of minus infinity: the running maximum, which starts there, stays finite."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was measured to be best."""

    warpgroups: int = 3
    """That compute; each has its own 8 tokens."""
    stages: int = 3
    """Steps whose keys, and whose values, are in shared memory."""
    pages: int = 2
    """Of a step."""
    blocks: int = NUM_MULTIPROCESSORS
    """That share the tiles: one for each multiprocessor."""

    @classmethod
    def of(cls, most_pages: int) -> "Tuning":
        """For queries that each see at most so many pages.

        H200, 2026-11-22, 8192 tokens: every earlier key 1250 us (440 TFLOP/s), a window of 128 138 us.
        """
        return cls() if most_pages > FEW_PAGES else cls(stages=4, pages=1)

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes, and of one that fetches."""
        return {1: (240, 40), 2: (240, 24), 3: (160, 32)}[self.warpgroups]


def attention(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    page_table: Int[Array, "B pages"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    sinks: Float[Array, "K G"],
    *,
    most_pages: int,
    interpret: bool = False,
    tuning: Tuning | None = None,
) -> Float[Array, "B T K G H"]:
    """See `pallas_kernels.attention.hopper.attention`."""
    arguments = queries, keys, values, page_table, first, last, sinks
    return _call(*arguments, tuning or Tuning.of(most_pages), log_sums=False, interpret=interpret)[0]


def attention_and_log_sums(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "P K slots W"],
    values: Float[Array, "P K slots W"],
    page_table: Int[Array, "B pages"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    sinks: Float[Array, "K G"],
    *,
    most_pages: int,
    interpret: bool = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """The same, and for each query the base-2 logarithm of its softmax's denominator, the sink in it."""
    arguments = queries, keys, values, page_table, first, last, sinks
    attended, log_sums = _call(*arguments, Tuning.of(most_pages), log_sums=True, interpret=interpret)
    batch, num_kv_heads = log_sums.shape[:2]
    by_token = log_sums.reshape(batch, num_kv_heads, -1, GROUP).transpose(0, 2, 1, 3)
    return attended, by_token[:, : queries.shape[1]]


def _call(
    queries: Array, keys: Array, values: Array, page_table: Array, first: Array, last: Array, sinks: Array,
    tuning: Tuning, *, log_sums: bool, interpret: bool,
) -> list[Array]:  # fmt: skip
    batch, _, num_kv_heads = queries.shape[:3]
    plan, rows = planning.plan(first, last, warpgroups=tuning.warpgroups)
    transforms = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH))  # pyright: ignore[reportAbstractUsage]
    shared = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=transforms)
    ring = functools.partial(plgpu.Barrier, num_barriers=tuning.stages)
    pages = (tuning.stages, tuning.pages * SLOTS, WIDTH)
    results = [jax.ShapeDtypeStruct(queries.shape, queries.dtype)]
    if log_sums:
        tiles = plan.shape[1] * tuning.warpgroups
        results.append(jax.ShapeDtypeStruct((batch, num_kv_heads, tiles, ROWS_OF_TILE), jnp.float32))
    kernel = plgpu.kernel(
        functools.partial(_block, tuning=tuning, parts=interpreted() if interpret else hardware()),
        out_type=results,
        grid=(min(tuning.blocks, plan.shape[1] * batch * num_kv_heads),),
        grid_names=("block",),
        num_threads=tuning.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "tiles": shared((tuning.warpgroups, 2, ROWS_OF_TILE, WIDTH)),
            "key_pages": shared(pages),
            "value_pages": shared(pages),
            "queries_arrived": plgpu.Barrier(num_barriers=2 * tuning.warpgroups, num_arrivals=TOKENS),
            "keys_arrived": ring(num_arrivals=tuning.pages),
            "values_arrived": ring(num_arrivals=tuning.pages),
            "keys_used": ring(num_arrivals=tuning.warpgroups),
            "values_used": ring(num_arrivals=tuning.warpgroups),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="attention_prefill",
    )
    return kernel(queries, keys, values, page_table, plan, rows, sinks)


def _block(
    queries, keys, values, table, plan, rows, sinks, out, log_sums=None, *, tuning: Tuning, parts: Parts, **scratch
) -> None:
    warpgroup = lax.axis_index("warpgroup")
    memory = types.SimpleNamespace(**scratch)
    tiles = Tiles(plan, queries.shape[2], blocks=tuning.blocks, pages=tuning.pages)

    @pl.when(warpgroup < tuning.warpgroups)
    def compute():
        plgpu.set_max_registers(tuning.registers[0], action="increase")
        last_token = queries.shape[1] - 1

        def first_token(tile):
            return TOKENS * (tile * tuning.warpgroups + warpgroup)

        def buffer(turn):
            half = lax.rem(turn, 2)
            return memory.tiles.at[warpgroup, half], memory.queries_arrived.at[2 * warpgroup + half]

        def load_queries(turn):
            row, tile, head = tiles.place(turn)
            own, arrived = buffer(turn)
            for i in range(TOKENS):
                source = queries.at[row, jnp.minimum(first_token(tile) + i, last_token), head]
                plgpu.copy_gmem_to_smem(source, own.at[pl.ds(GROUP * i, GROUP)], arrived)

        load_queries(0)

        def attend(turn, done):
            row, tile, head = tiles.place(turn)
            begin, num_steps = tiles.steps(row, tile)
            own, arrived = buffer(turn)

            def load_next():
                plgpu.wait_smem_to_gmem(
                    0, wait_read_only=True
                )  # the answers of the tile before this one leave the buffer
                pl.when(tiles.exists(turn + 1))(lambda: load_queries(turn + 1))

            @pl.when(tiles.exists(turn))
            def attend_tile():
                slots = [plgpu.load(rows.at[row, tile, warpgroup, i], layout=ROWS, optimized=False) for i in range(2)]
                sink = _per_head([sinks[head, i].astype(jnp.float32) for i in range(GROUP)])
                facts = plan.at[row, tile]
                visibility = _Visibility(facts, rows.at[row, tile], warpgroup, slots[0], slots[1], tuning)
                plgpu.barrier_wait(arrived)
                load_next()
                answers, log_sum = _attend(own, sink, begin, done, num_steps, visibility, memory, tuning, parts)
                if log_sums is not None:
                    log_sums[row, head, tile * tuning.warpgroups + warpgroup] = log_sum
                plgpu.commit_smem()  # every warp is done with the queries
                own[...] = answers
                plgpu.commit_smem()
                token = first_token(tile)
                for i in range(TOKENS):
                    source, target = own.at[pl.ds(GROUP * i, GROUP)], out.at[row, token + i, head]
                    pl.when(token + i <= last_token)(functools.partial(plgpu.copy_smem_to_gmem, source, target))

            return done + num_steps

        lax.fori_loop(0, tiles.turns, attend, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tuning.warpgroups)
    def fetch():
        plgpu.set_max_registers(tuning.registers[1], action="decrease")

        def fetch_tile(turn, done):
            row, tile, head = tiles.place(turn)
            begin, num_steps = tiles.steps(row, tile)
            end = plan[row, tile, planning.END]

            def fetch_step(step, _):
                stage = lax.rem(done + step, tuning.stages)
                pages = [jnp.minimum(begin + step * tuning.pages + i, end - 1) for i in range(tuning.pages)]
                numbers = [jnp.clip(table[row, page], 0, keys.shape[0] - 1) for page in pages]
                for pool, ring, arrived, used in (
                    (keys, memory.key_pages, memory.keys_arrived, memory.keys_used),
                    (values, memory.value_pages, memory.values_arrived, memory.values_used),
                ):
                    pl.when(done + step >= tuning.stages)(functools.partial(plgpu.barrier_wait, used.at[stage]))
                    for i, number in enumerate(numbers):
                        place = ring.at[stage, pl.ds(SLOTS * i, SLOTS)]
                        plgpu.copy_gmem_to_smem(pool.at[number, head], place, arrived.at[stage])
                return _

            lax.fori_loop(0, jnp.where(tiles.exists(turn), num_steps, 0), fetch_step, 0)
            return done + jnp.where(tiles.exists(turn), num_steps, 0)

        done = lax.fori_loop(0, tiles.turns, fetch_tile, jnp.int32(0))
        for stage in range(tuning.stages):
            for used in (memory.keys_used, memory.values_used):
                pl.when(stage < done)(functools.partial(plgpu.barrier_wait, used.at[stage]))


def _attend(queries, sink, begin, done, num_steps, visibility: "_Visibility", memory, tuning: Tuning, parts: Parts):
    """The attended rows of one warpgroup, and the base-2 logarithms of their denominators.

    One base-2 sink a row; `done` steps have been through the ring before.
    """
    scale = WIDTH**-0.5 * LOG2_E
    columns = tuning.pages * SLOTS
    zero = lax.shift_right_logical(begin, 31)

    def page_of(step):
        return begin + tuning.pages * step

    def softmax(page, largest, denominator, scores):
        scores = lax.cond(
            visibility.is_edge(page), functools.partial(visibility.mask, page), lambda scores: scores, scores
        )
        new_largest = jnp.maximum(largest, scores.max(axis=1) * scale)
        weights = jnp.exp2(scores * scale - _along_rows(new_largest, columns))
        shrink = jnp.exp2(largest - new_largest)
        denominator = denominator * shrink + weights.sum(axis=1)
        return weights.astype(jnp.bfloat16), denominator, new_largest, shrink

    def at(step):
        stage = lax.rem(done + step, tuning.stages)
        return memory.key_pages.at[stage], memory.value_pages.at[stage], stage

    def finish_values(step):
        _, values, stage = at(step)
        plgpu.barrier_wait(memory.values_arrived.at[stage])
        page = page_of(step)
        pl.when(visibility.is_edge(page))(lambda: visibility.clear_unseen(page, values))

    def first_step():
        keys, _, stage = at(0)
        plgpu.barrier_wait(memory.keys_arrived.at[stage])
        release = functools.partial(plgpu.barrier_arrive, memory.keys_used.at[stage])
        scores = parts.first(queries, keys, release)
        weights, denominator, largest, _ = softmax(begin, sink, jnp.exp2(sink - sink), scores)
        finish_values(0)
        return weights, denominator, largest

    def next_step(step, carry):
        accumulator, weights, denominator, largest = carry
        keys, _, stage = at(step)
        _, values, previous = at(step - 1)
        plgpu.barrier_wait(memory.keys_arrived.at[stage])
        release = functools.partial(plgpu.barrier_arrive, memory.keys_used.at[stage])
        (weights, denominator, largest, shrink), accumulator = parts.next(
            queries, keys, release, weights, values, accumulator,
            functools.partial(softmax, page_of(step), largest, denominator), zero,
        )  # fmt: skip
        plgpu.barrier_arrive(memory.values_used.at[previous])
        finish_values(step)
        return accumulator * _along_rows(shrink, WIDTH), weights, denominator, largest

    nothing = plgpu.layout_cast(jnp.zeros((ROWS_OF_TILE, WIDTH), jnp.float32), plgpu.Layout.WGMMA)

    def all_steps():
        weights, denominator, largest = first_step()
        accumulator, weights, denominator, largest = lax.fori_loop(
            1, num_steps, next_step, (nothing, weights, denominator, largest)
        )
        _, values, stage = at(num_steps - 1)
        accumulator = parts.last(weights, values, accumulator)
        plgpu.barrier_arrive(memory.values_used.at[stage])
        # Not a factor of zero: a warpgroup whose tokens all see nothing has masked nothing, and may have met NaN.
        sees = _along_rows(jnp.where(visibility.sees_something, 1, 0), WIDTH) != 0
        attended = jnp.where(sees, accumulator * _along_rows(1.0 / denominator, WIDTH), 0.0)
        return attended, largest + jnp.log2(denominator)

    attended, log_sums = lax.cond(num_steps > 0, all_steps, lambda: (nothing, sink))
    return attended.astype(jnp.bfloat16), log_sums


class _Visibility:
    """Which slots the rows of a warpgroup see."""

    def __init__(self, facts, tile_rows, warpgroup, first, last, tuning: Tuning) -> None:
        self.low, self.high = facts[planning.LOW], facts[planning.HIGH]
        self.has_holes = facts[planning.HAS_HOLES]
        self.all_from = facts[planning.WARPGROUP_FACTS + 2 * warpgroup]
        self.all_to = facts[planning.WARPGROUP_FACTS + 2 * warpgroup + 1]
        self.first, self.last = first, last
        self.tile_rows, self.num_warpgroups = tile_rows, tuning.warpgroups
        self.columns = tuning.pages * SLOTS
        self.sees_something = first <= last

    def is_edge(self, page) -> Bool[Array, ""]:
        """Whether some row of the warpgroup does not see all of the step that begins with the page."""
        return (page * SLOTS < self.all_from) | (page * SLOTS + self.columns > self.all_to + 1)

    def mask(self, page, scores: Float[Array, "rows slots"]) -> Float[Array, "rows slots"]:
        """Minus infinity for the step's slots that a row does not see, whatever their scores are."""
        slot = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        base = page * SLOTS
        seen = (slot >= _along_rows(self.first - base, self.columns)) & (
            slot <= _along_rows(self.last - base, self.columns)
        )
        return jnp.where(seen, scores, -jnp.inf)

    def clear_unseen(self, page, values) -> None:
        """Zeros for the slots no row of the block sees: they may hold NaN, and 0 * NaN is NaN.

        Every warpgroup of the block does it before it multiplies with the page. All write the same.
        """
        slot = page * SLOTS + plgpu.broadcasted_iota(jnp.int32, (self.columns,), 0, layout=ROWS)

        def any_token():
            def add(index, seen):
                warpgroup, row = lax.div(index, TOKENS), GROUP * lax.rem(index, TOKENS)
                low, high = self.tile_rows[warpgroup, 0, row], self.tile_rows[warpgroup, 1, row]
                return jnp.where((slot >= low) & (slot <= high), 1, seen)

            return lax.fori_loop(0, TOKENS * self.num_warpgroups, add, jnp.zeros_like(slot))

        def in_between():
            return jnp.where((slot >= self.low) & (slot <= self.high), 1, 0)

        seen = lax.cond(self.has_holes != 0, any_token, in_between)
        page_values = plgpu.load(values, layout=plgpu.Layout.WGMMA)
        values[...] = jnp.where(_along_rows(seen, WIDTH) != 0, page_values, jnp.zeros_like(page_values))
        plgpu.commit_smem()


def _per_head(scalars: list[Float[Array, ""]]) -> Float[Array, " rows"]:
    """A tile's row r has query head r % 8: sinks in base 2."""
    head = lax.rem(plgpu.broadcasted_iota(jnp.int32, (ROWS_OF_TILE,), 0, layout=ROWS), GROUP)
    rows = plgpu.layout_cast(jnp.full((ROWS_OF_TILE,), LOWEST_SINK, jnp.float32), ROWS)
    for index, scalar in enumerate(scalars):
        rows = jnp.where(head == index, jnp.maximum(scalar * LOG2_E, LOWEST_SINK), rows)
    return rows


def _along_rows(rows: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(rows, (*rows.shape, columns), [0])
