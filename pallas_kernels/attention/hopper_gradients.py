"""Gradients of attention on Hopper: one kernel for those of keys and values, one for those of queries.

Dao et al. 2022 (arXiv 2205.14135), appendix B.2, but each result is added up in one place, in one order: both kernels
compute the weights again, from the sums that the forward pass found. A block of the one holds keys and values and goes
through the rows that see them; a block of the other holds rows and goes through the keys that they see. What it goes
through is brought by a warpgroup of its own, through a ring in shared memory.

A row is one query head of one token. Under the interpreter the products are plain JAX
(`hopper_gradients_parts.interpreted`); the ring, its barriers and copies are those of the hardware. Times on an H200
are in docs/kernels.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.attention.hopper_gradients_parts import SCALE, TILE, WIDTH, Softmax, hardware, interpreted, zeros

WARPGROUPS = 2
"""That compute; each holds a tile."""
BLOCK = WARPGROUPS * TILE
"""Rows, or keys, that a block holds."""

_STAGES = 4
"""Of the ring."""
_REGISTERS = (240, 24)
"""Of a thread that computes, and of one that fetches."""

Ref = Any


def gradients_of_keys(
    queries: BFloat16[Array, "R rows 64"],
    d_answers: BFloat16[Array, "R rows 64"],
    facts: Float[Array, "R tiles 4 64"],
    keys: BFloat16[Array, "heads T 64"],
    values: BFloat16[Array, "heads T 64"],
    bounds: Int[Array, "B blocks 2"],
    *,
    interpret: bool = False,
) -> list[Float[Array, "R T 64"]]:
    """What each group of rows adds to the gradients of its keys and of its values.

    Group r has the keys of head r // (R // heads), and row r // (R // B) of `bounds`: for every 128 keys the first tile
    of 64 rows that sees any of them, and one past the last. `facts` are those of `Softmax`. `rows` is a multiple of 64,
    T of 128.
    """
    parts = interpreted() if interpret else hardware()

    def of_keys(block: _Block, d_keys: Ref, d_values: Ref) -> None:
        own_keys, own_values = block.held

        def step(_, streamed: Sequence[Ref], sums: tuple[Array, ...]) -> tuple[Array, ...]:
            queries, d_answers, facts = streamed
            softmax = Softmax.of_columns(block.first, facts)
            weights, d_scores = parts.weights(own_keys, queries, own_values, d_answers, softmax)
            return parts.add(sums, (d_scores, weights), (queries, d_answers))

        sum_of_keys, sum_of_values = block.go_through(step, (zeros(), zeros()))
        place = block.group, pl.ds(block.first, TILE)
        d_keys[place] = sum_of_keys * SCALE
        d_values[place] = sum_of_values

    sums = jax.ShapeDtypeStruct((len(queries), *keys.shape[1:]), jnp.float32)
    arrays = (keys, values), (queries, d_answers, facts)
    return _launch("attention_gradients_of_keys", of_keys, *arrays, bounds, [sums, sums], interpret=interpret)


def gradients_of_queries(
    queries: BFloat16[Array, "R rows 64"],
    d_answers: BFloat16[Array, "R rows 64"],
    facts: Float[Array, "R tiles 4 64"],
    keys: BFloat16[Array, "heads T 64"],
    values: BFloat16[Array, "heads T 64"],
    bounds: Int[Array, "B blocks 2"],
    *,
    interpret: bool = False,
) -> BFloat16[Array, "R rows 64"]:
    """As `gradients_of_keys`, but `bounds` has, for every 128 rows, the tiles of 64 keys that any of them sees.

    `rows` is a multiple of 128, T of 64.
    """
    parts = interpreted() if interpret else hardware()

    def of_queries(block: _Block, facts: Ref, d_queries: Ref) -> None:
        own_queries, own_d_answers = block.held
        softmax_from = Softmax.of_rows(facts.at[block.group, lax.div(block.first, TILE)])

        def step(index: Array, streamed: Sequence[Ref], sums: tuple[Array, ...]) -> tuple[Array, ...]:
            keys, values = streamed
            softmax = softmax_from(index * TILE)
            _, d_scores = parts.weights(own_queries, keys, own_d_answers, values, softmax)
            return parts.add(sums, (d_scores,), (keys,))

        (total,) = block.go_through(step, (zeros(),))
        plgpu.commit_smem()  # every warp is done with the queries
        own_queries[...] = (total * SCALE).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_queries, d_queries.at[block.group, pl.ds(block.first, TILE)])
        plgpu.wait_smem_to_gmem(0)

    out = jax.ShapeDtypeStruct(queries.shape, queries.dtype)
    held, streamed = (queries, d_answers), (keys, values)
    run = functools.partial(_launch, "attention_gradients_of_queries", of_queries, held, streamed, bounds, [out])
    return run(facts, last_first=True, interpret=interpret)[0]


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a warpgroup holds, and how it goes through the rest."""

    group: Int[Array, ""]
    """The group of rows."""
    first: Int[Array, ""]
    """The warpgroup's first key, or row."""
    held: Sequence[Ref]
    """Its tiles, in shared memory."""
    go_through: Callable[..., Any]
    """(function of a tile's index, the tiles of that index in shared memory and a carry, carry) -> the last carry."""


def _launch(
    name: str,
    compute: Callable[..., None],
    held: Sequence[Array],
    streamed: Sequence[Array],
    bounds: Int[Array, "B blocks 2"],
    results: list[jax.ShapeDtypeStruct],
    *others: Array,
    last_first: bool = False,
    interpret: bool,
) -> list[Array]:
    """Run `compute(block, *others, *results)` in each warpgroup of each block, the largest first.

    Of arrays with fewer groups than the results, several share one.
    """
    num_groups, num_blocks = results[0].shape[0], bounds.shape[1]
    transforms = (plgpu.TilingTransform((8, WIDTH)), plgpu.SwizzleTransform(2 * WIDTH))  # pyright: ignore[reportAbstractUsage]

    def shared(count: int, array: Array) -> Any:
        """Room for that many of an array's tiles."""
        if array.ndim == 4:
            return plgpu.SMEM((count, *array.shape[2:]), array.dtype)
        return plgpu.SMEM((count, TILE, WIDTH), array.dtype, transforms=transforms)

    def of_group(array: Any, group: Int[Array, ""]) -> Int[Array, ""]:
        return lax.div(group, num_groups // array.shape[0])

    def kernel(*refs: Ref, own: Sequence[Ref], ring: Sequence[Ref], own_arrived: Ref, arrived: Ref, used: Ref) -> None:
        held_refs, refs = refs[: len(own)], refs[len(own) :]
        streamed_refs, (bounds_ref, *others) = refs[: len(ring)], refs[len(ring) :]
        warpgroup, index = lax.axis_index("warpgroup"), lax.axis_index("block")
        place, group = lax.div(index, num_groups), lax.rem(index, num_groups)
        place = num_blocks - 1 - place if last_first else place
        begin, end = (bounds_ref[of_group(bounds_ref, group), place, i] for i in range(2))

        @pl.when(warpgroup < WARPGROUPS)
        def compute_tiles():
            plgpu.set_max_registers(_REGISTERS[0], action="increase")
            first = place * BLOCK + warpgroup * TILE
            tiles = [tile.at[warpgroup] for tile in own]
            for array, tile in zip(held_refs, tiles, strict=True):
                source = array.at[of_group(array, group), pl.ds(first, TILE)]
                plgpu.copy_gmem_to_smem(source, tile, own_arrived.at[warpgroup])

            def go_through(function: Callable[..., Any], carry: Any) -> Any:
                def step(count, carry):
                    stage = lax.rem(count, _STAGES)
                    plgpu.barrier_wait(arrived.at[stage])
                    carry = function(begin + count, [tile.at[stage] for tile in ring], carry)
                    plgpu.barrier_arrive(used.at[stage])
                    return carry

                return lax.fori_loop(0, end - begin, step, carry)

            plgpu.barrier_wait(own_arrived.at[warpgroup])
            compute(_Block(group, first, tiles, go_through), *others)

        @pl.when(warpgroup == WARPGROUPS)
        def fetch():
            plgpu.set_max_registers(_REGISTERS[1], action="decrease")

            def fetch_step(count, _):
                stage = lax.rem(count, _STAGES)
                pl.when(count >= _STAGES)(lambda: plgpu.barrier_wait(used.at[stage]))
                for array, tile in zip(streamed_refs, ring, strict=True):
                    index = begin + count
                    at = index if len(array.shape) == 4 else pl.ds(index * TILE, TILE)
                    plgpu.copy_gmem_to_smem(array.at[of_group(array, group), at], tile.at[stage], arrived.at[stage])
                return _

            lax.fori_loop(0, end - begin, fetch_step, 0)
            for stage in range(_STAGES):
                pl.when(stage < end - begin)(functools.partial(plgpu.barrier_wait, used.at[stage]))

    run = plgpu.kernel(
        kernel,
        out_type=results,
        grid=(num_blocks * num_groups,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types={
            "own": [shared(WARPGROUPS, array) for array in held],
            "ring": [shared(_STAGES, array) for array in streamed],
            "own_arrived": plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=len(held)),
            "arrived": plgpu.Barrier(num_barriers=_STAGES, num_arrivals=len(streamed)),
            "used": plgpu.Barrier(num_barriers=_STAGES, num_arrivals=WARPGROUPS),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name=name,
    )
    return run(*held, *streamed, bounds, *others)
