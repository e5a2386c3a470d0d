"""Attention of many tokens over pages on Hopper: wgmma tiles of 8 tokens x 8 query heads of one kv head.

The warpgroups of a block share the pages of one kv head, which a warpgroup of its own brings through a ring in shared
memory. Within a warpgroup the softmax of one page overlaps the products of the next and the previous one (Shah et al.
2024, FlashAttention-3, arXiv 2407.08608).
"""

import dataclasses
import functools
import math
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import hopper_prefill_plan as planning
from pallas_kernels.attention.hopper_prefill_parts import WIDTH, Parts, hardware, interpreted

GROUP = 8
SLOTS = 64
TOKENS = planning.WARPGROUP_TOKENS
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""One number per row of a tile."""
LOG2_E = math.log2(math.e)
LOWEST_SINK = -1e30
"""Stands in for a sink of minus infinity: the running maximum, which starts there, stays finite."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was measured to be best."""

    warpgroups: int = 3
    """That compute; each has its own 8 tokens."""
    stages: int = 4
    """Pages of keys, and of values, in shared memory."""

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes, and of one that fetches."""
        return {1: (240, 40), 2: (240, 24), 3: (160, 32)}[self.warpgroups]


def attention(
    queries: Float[Array, "B T K G H"],
    keys: Float[Array, "P K slots H"],
    values: Float[Array, "P K slots H"],
    page_table: Int[Array, "B pages"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
    sinks: Float[Array, "K G"],
    *,
    interpret: bool = False,
    tuning: Tuning | None = None,
) -> Float[Array, "B T K G H"]:
    """See `pallas_kernels.attention.hopper.attention`."""
    tuning = tuning or Tuning()
    batch, _, num_kv_heads = queries.shape[:3]
    plan, rows = planning.plan(first, last, warpgroups=tuning.warpgroups)
    transforms = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH))  # pyright: ignore[reportAbstractUsage]
    pages = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=transforms)
    ring = functools.partial(plgpu.Barrier, num_barriers=tuning.stages)
    kernel = plgpu.kernel(
        functools.partial(_block, tuning=tuning, parts=interpreted() if interpret else hardware()),
        out_type=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        grid=(plan.shape[1], batch, num_kv_heads),
        grid_names=("tile", "row", "head"),
        num_threads=tuning.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "tiles": pages((tuning.warpgroups, SLOTS, WIDTH)),
            "key_pages": pages((tuning.stages, SLOTS, WIDTH)),
            "value_pages": pages((tuning.stages, SLOTS, WIDTH)),
            "queries_arrived": plgpu.Barrier(num_barriers=tuning.warpgroups, num_arrivals=TOKENS),
            "keys_arrived": ring(),
            "values_arrived": ring(),
            "keys_used": ring(num_arrivals=tuning.warpgroups),
            "values_used": ring(num_arrivals=tuning.warpgroups),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="attention_prefill",
    )
    return kernel(queries, keys, values, page_table, plan, rows, sinks)


def _block(queries, keys, values, table, plan, rows, sinks, out, *, tuning: Tuning, parts: Parts, **scratch) -> None:
    warpgroup, row, head = lax.axis_index("warpgroup"), lax.axis_index("row"), lax.axis_index("head")
    # The last tokens see most: their blocks start first.
    tile = plan.shape[1] - 1 - lax.axis_index("tile")
    memory = types.SimpleNamespace(**scratch)
    facts = plan.at[row, tile]
    begin = facts[planning.BEGIN]
    num_pages = facts[planning.END] - begin

    @pl.when(warpgroup < tuning.warpgroups)
    def compute():
        plgpu.set_max_registers(tuning.registers[0], action="increase")
        token = TOKENS * (tile * tuning.warpgroups + warpgroup)
        own = memory.tiles.at[warpgroup]
        arrived = memory.queries_arrived.at[warpgroup]
        last_token = queries.shape[1] - 1
        for i in range(TOKENS):
            source = queries.at[row, jnp.minimum(token + i, last_token), head]
            plgpu.copy_gmem_to_smem(source, own.at[pl.ds(GROUP * i, GROUP)], arrived)
        slots = [plgpu.load(rows.at[row, tile, warpgroup, i], layout=ROWS, optimized=False) for i in range(2)]
        sink = _per_head([sinks[head, i].astype(jnp.float32) for i in range(GROUP)])
        visibility = _Visibility(facts, rows.at[row, tile], warpgroup, slots[0], slots[1], tuning.warpgroups)
        plgpu.barrier_wait(arrived)
        fragment = plgpu.load(own, layout=plgpu.Layout.WGMMA)
        own[...] = _attend(fragment, sink, begin, num_pages, visibility, memory, tuning.stages, parts)
        plgpu.commit_smem()
        for i in range(TOKENS):
            source, target = own.at[pl.ds(GROUP * i, GROUP)], out.at[row, token + i, head]
            pl.when(token + i <= last_token)(functools.partial(plgpu.copy_smem_to_gmem, source, target))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tuning.warpgroups)
    def fetch():
        plgpu.set_max_registers(tuning.registers[1], action="decrease")

        @pl.loop(0, num_pages)
        def fetch_page(step):
            stage = lax.rem(step, tuning.stages)
            page = jnp.clip(table[row, begin + step], 0, keys.shape[0] - 1)
            for pool, pages, arrived, used in (
                (keys, memory.key_pages, memory.keys_arrived, memory.keys_used),
                (values, memory.value_pages, memory.values_arrived, memory.values_used),
            ):
                pl.when(step >= tuning.stages)(functools.partial(plgpu.barrier_wait, used.at[stage]))
                plgpu.copy_gmem_to_smem(pool.at[page, head], pages.at[stage], arrived.at[stage])


def _attend(queries, sink, begin, num_pages, visibility: "_Visibility", memory, stages: int, parts: Parts):
    """The attended rows of one warpgroup; queries as a fragment, one sink per row."""
    scale = WIDTH**-0.5 * LOG2_E

    def softmax(page, largest, denominator, scores):
        scores = lax.cond(
            visibility.is_edge(page), functools.partial(visibility.mask, page), lambda scores: scores, scores
        )
        new_largest = jnp.maximum(largest, scores.max(axis=1) * scale)
        weights = jnp.exp2(scores * scale - _along_rows(new_largest))
        shrink = jnp.exp2(largest - new_largest)
        return weights, denominator * shrink + weights.sum(axis=1), new_largest, shrink

    def at(step):
        stage = lax.rem(step, stages)
        return memory.key_pages.at[stage], memory.value_pages.at[stage], stage

    def finish_values(step):
        _, values, stage = at(step)
        plgpu.barrier_wait(memory.values_arrived.at[stage])
        pl.when(visibility.is_edge(begin + step))(lambda: visibility.clear_unseen(begin + step, values))

    def first_page():
        keys, _, stage = at(0)
        plgpu.barrier_wait(memory.keys_arrived.at[stage])
        release = functools.partial(plgpu.barrier_arrive, memory.keys_used.at[stage])
        scores = parts.first(queries, keys, release)
        weights, denominator, largest, _ = softmax(begin, sink, jnp.exp2(sink - sink), scores)
        finish_values(0)
        return weights.astype(jnp.bfloat16), denominator, largest

    def next_page(step, carry):
        accumulator, weights, denominator, largest = carry
        keys, _, stage = at(step)
        _, values, previous = at(step - 1)
        plgpu.barrier_wait(memory.keys_arrived.at[stage])
        release = functools.partial(plgpu.barrier_arrive, memory.keys_used.at[stage])
        (weights, denominator, largest, shrink), accumulator = parts.next(
            queries, keys, release, weights, values, accumulator,
            functools.partial(softmax, begin + step, largest, denominator),
        )  # fmt: skip
        plgpu.barrier_arrive(memory.values_used.at[previous])
        finish_values(step)
        return accumulator * _along_rows(shrink), weights.astype(jnp.bfloat16), denominator, largest

    nothing = plgpu.layout_cast(jnp.zeros((SLOTS, WIDTH), jnp.float32), plgpu.Layout.WGMMA)

    def all_pages():
        weights, denominator, largest = first_page()
        accumulator, weights, denominator, _ = lax.fori_loop(
            1, num_pages, next_page, (nothing, weights, denominator, largest)
        )
        accumulator = parts.last(weights, at(num_pages - 1)[1], accumulator)
        # Not a factor of zero: a warpgroup whose tokens all see nothing has masked nothing, and may have met NaN.
        sees = _along_rows(jnp.where(visibility.sees_something, 1, 0)) != 0
        return jnp.where(sees, accumulator * _along_rows(1.0 / denominator), 0.0)

    attended = lax.cond(num_pages > 0, all_pages, lambda: nothing)
    return attended.astype(jnp.bfloat16)


class _Visibility:
    """Which slots the rows of a warpgroup see."""

    def __init__(self, facts, tile_rows, warpgroup, first, last, num_warpgroups: int) -> None:
        self.low, self.high = facts[planning.LOW], facts[planning.HIGH]
        self.has_holes = facts[planning.HAS_HOLES]
        self.all_from = facts[planning.WARPGROUP_FACTS + 2 * warpgroup]
        self.all_to = facts[planning.WARPGROUP_FACTS + 2 * warpgroup + 1]
        self.first, self.last = first, last
        self.tile_rows, self.num_warpgroups = tile_rows, num_warpgroups
        self.sees_something = first <= last

    def is_edge(self, page) -> Bool[Array, ""]:
        """Whether some row of the warpgroup does not see all of the page."""
        return (page * SLOTS < self.all_from) | ((page + 1) * SLOTS > self.all_to + 1)

    def mask(self, page, scores: Float[Array, "rows slots"]) -> Float[Array, "rows slots"]:
        """Minus infinity for slots that a row does not see, whatever their scores are."""
        slot = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        base = page * SLOTS
        seen = (slot >= _along_rows(self.first - base)) & (slot <= _along_rows(self.last - base))
        return jnp.where(seen, scores, -jnp.inf)

    def clear_unseen(self, page, values) -> None:
        """Zeros for the slots no row of the block sees: they may hold NaN, and 0 * NaN is NaN.

        Every warpgroup of the block does it before it multiplies with the page. All write the same.
        """
        slot = page * SLOTS + plgpu.broadcasted_iota(jnp.int32, (SLOTS,), 0, layout=ROWS)

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
        values[...] = jnp.where(_along_rows(seen) != 0, page_values, jnp.zeros_like(page_values))
        plgpu.commit_smem()


def _per_head(scalars: list[Float[Array, ""]]) -> Float[Array, " rows"]:
    """A tile's row r has query head r % 8: sinks in base 2."""
    head = lax.rem(plgpu.broadcasted_iota(jnp.int32, (SLOTS,), 0, layout=ROWS), GROUP)
    rows = plgpu.layout_cast(jnp.full((SLOTS,), LOWEST_SINK, jnp.float32), ROWS)
    for index, scalar in enumerate(scalars):
        rows = jnp.where(head == index, jnp.maximum(scalar * LOG2_E, LOWEST_SINK), rows)
    return rows


def _along_rows(rows: Array) -> Array:
    return lax.broadcast_in_dim(rows, (SLOTS, WIDTH), [0])
