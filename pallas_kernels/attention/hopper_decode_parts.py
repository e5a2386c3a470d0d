"""What a warpgroup of the decode kernel does with pages, and what stands in for it under the interpreter.

On the hardware it is inline PTX: `hopper_decode_registers` attends, `hopper_decode_merge` brings the parts together.
The interpreter does not know PTX; there both are jax.numpy.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import hopper_decode_merge as merging
from pallas_kernels.attention import hopper_decode_registers as registers
from pallas_kernels.attention.hopper_decode_registers import GROUP, LOWEST, SCALE, SLOTS, WARPS, WIDTH
from pallas_kernels.hopper_card import LOG2_E


@dataclasses.dataclass(frozen=True)
class Parts:
    """The pieces; a state is (denominators and largest scores, weighted values), opaque outside."""

    memory: dict[str, tuple[int, ...]]
    """Shapes of the float32 scratch in shared memory."""
    load_queries: Callable[..., Any]
    """(a ref of each token's `G H`) -> queries."""
    load_entries: Callable[..., Any]
    """(ref of a row's page table of at most `ENTRIES` entries) -> entries."""
    entry: Callable[..., Any]
    """(entries, index) -> the entry."""
    load_sinks: Callable[..., Any]
    """(ref of a kv head's sinks) -> sinks, for `finish`."""
    load_page: Callable[..., Any]
    """(whether there is such a page, ref of its keys, ref of its values, place) -> page, on its way.

    `place` is a ref of `memory["pages"]`, where there is one.
    """
    start: Callable[[], Any]
    """() -> the state before the first page."""
    attend: Callable[..., Any]
    """(queries, page, place, each token's first and last slot counted from the page's first, state) -> state."""
    store: Callable[..., None]
    """(state, memory, warpgroup) -> nothing."""
    finish: Callable[..., None]
    """(memory, sinks, refs of the tokens' `G H` answers, which of them to write, split) -> nothing."""


def hardware(num_tokens: int, *, warpgroups: int, splits: int, depth: int, shared: bool) -> Parts:
    """The pieces as inline PTX."""
    parts_of_block = WARPS * warpgroups
    memory: dict[str, tuple[int, ...]] = {
        "weighted": (parts_of_block, num_tokens * registers.PART_VALUES),
        "sums": (parts_of_block, 2 * num_tokens * GROUP),
    }
    if splits > 1:
        memory |= {
            "cluster_weighted": (splits, num_tokens * registers.PART_VALUES),
            "cluster_sums": (splits, 2 * num_tokens * GROUP),
        }

    if shared:
        memory["pages"] = (warpgroups, depth, registers.PAGE_BYTES // 4)

    def load_page(present, keys, values, place):
        if not shared:
            return registers.load_page()(present, keys, values)
        registers.fetch_page()(present, keys, values, place)
        return ()

    def start():
        return tuple(
            plgpu.layout_cast(jnp.full(layout.args[0], value, jnp.float32), layout)
            for value, layout in zip((LOWEST, 0.0, 0.0), registers.state_layouts(num_tokens), strict=True)
        )

    def attend(queries, page, place, bounds, state):
        if shared:
            page = registers.take_page(depth - 1)(place)
        return registers.attend(num_tokens)(queries, *page, *sum(bounds, ()), *state)

    def store(state, memory, warpgroup):
        own = pl.ds(WARPS * warpgroup, WARPS)
        merging.store(num_tokens)(*state, memory["weighted"].at[own], memory["sums"].at[own])

    def finish(memory, sinks, targets, valid, split):
        def write(weighted, sums, count):
            merging.finish(num_tokens, count)(weighted, sums, sinks, tuple(targets), tuple(valid))

        if splits == 1:
            write(memory["weighted"], memory["sums"], parts_of_block)
            return
        merging.send(num_tokens, parts_of_block)(
            memory["weighted"], memory["sums"], memory["cluster_weighted"].at[split], memory["cluster_sums"].at[split]
        )
        pl.when(split == 0)(lambda: write(memory["cluster_weighted"], memory["cluster_sums"], splits))

    return Parts(
        memory=memory,
        load_queries=registers.load_queries(num_tokens),
        load_entries=lambda table: registers.load_entries(table.shape[0])(table),
        entry=registers.entry,
        load_sinks=merging.load_sinks,
        load_page=load_page,
        start=start,
        attend=attend,
        store=store,
        finish=finish,
    )


def interpreted(num_tokens: int, *, warpgroups: int, splits: int, depth: int, shared: bool) -> Parts:
    """The pieces as jax.numpy: one softmax a warpgroup instead of one a warp, and no cluster."""
    assert splits == 1, splits
    del depth, shared
    rows = GROUP * num_tokens

    def load_page(present, keys, values, place):
        del present, place
        return keys[...], values[...]

    def start():
        return jnp.full(rows, LOWEST, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((rows, WIDTH), jnp.float32)

    def attend(queries, page, place, bounds, state):
        del place
        keys, values = page
        slot = lax.broadcasted_iota(jnp.int32, (num_tokens, GROUP, SLOTS), 2)
        low, high = (jnp.stack(ends)[:, None, None] for ends in zip(*bounds, strict=True))
        seen = (slot >= low) & (slot <= high)
        scores = SCALE * jnp.dot(queries, keys.T, preferred_element_type=jnp.float32)
        scores = jnp.where(seen.reshape(rows, SLOTS), scores, -jnp.inf)
        values = jnp.where(seen.any((0, 1))[:, None], values, jnp.zeros_like(values))
        return _join([state, _softmax(scores, values)])

    def store(state, memory, warpgroup):
        for name, value in zip(("largest", "denominators", "weighted"), state, strict=True):
            memory[name].at[warpgroup][...] = value

    def finish(memory, sinks, targets, valid, split):
        del split
        loaded = [memory[name][...] for name in ("largest", "denominators", "weighted")]
        largest, denominators, weighted = _join([tuple(part[i] for part in loaded) for i in range(warpgroups)])
        sink = jnp.tile(jnp.maximum(sinks.astype(jnp.float32) * LOG2_E, LOWEST), num_tokens)
        top = jnp.maximum(largest, sink)
        shrink = jnp.exp2(largest - top)
        answers = weighted * (shrink / (denominators * shrink + jnp.exp2(sink - top)))[:, None]
        for index, (target, write) in enumerate(zip(targets, valid, strict=True)):

            def write_answer(index=index, target=target):
                target[...] = answers[GROUP * index : GROUP * (index + 1)].astype(jnp.bfloat16)

            pl.when(write)(write_answer)

    return Parts(
        memory={
            "largest": (warpgroups, rows),
            "denominators": (warpgroups, rows),
            "weighted": (warpgroups, rows, WIDTH),
        },
        load_queries=lambda *refs: jnp.concatenate([ref[...] for ref in refs]),
        load_entries=lambda table: table,
        entry=lambda table, index: table[index],
        load_sinks=lambda sinks: sinks[...],
        load_page=load_page,
        start=start,
        attend=attend,
        store=store,
        finish=finish,
    )


def _softmax(scores, values):
    largest = jnp.maximum(scores.max(1), LOWEST)
    weights = jnp.exp2(scores - largest[:, None])
    weighted = jnp.dot(weights.astype(jnp.bfloat16), values, preferred_element_type=jnp.float32)
    return largest, weights.sum(1), weighted


def _join(states):
    """The softmax over all the keys of several states."""
    largest = functools.reduce(jnp.maximum, [state[0] for state in states])
    shrinks = [jnp.exp2(state[0] - largest) for state in states]
    denominators = sum(shrink * state[1] for shrink, state in zip(shrinks, states, strict=True))
    weighted = sum(shrink[:, None] * state[2] for shrink, state in zip(shrinks, states, strict=True))
    return largest, denominators, weighted
