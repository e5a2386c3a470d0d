"""Attention of a few tokens over pages on Hopper: the pages of a row are dealt out to many warpgroups.

Each warpgroup asks for its pages ahead of the one it attends for. Until then they wait in shared memory, where only the
thread that asked for a run of 16 bytes looks at it, or in that thread's registers (`Tuning.of` says when which); both
ways they reach registers as the fragments of mma. A warpgroup keeps softmaxes of its own, one a warp. The warpgroups of
a block meet in shared memory, the blocks of a row and kv head in the shared memory of the first of them, as a cluster:
no second kernel, and always the same order of additions. The sink joins last.

Under the interpreter the pieces are plain JAX (`hopper_decode_parts.interpreted`), and one block has all the pages of a
row.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.hopper_decode_parts import Parts, hardware, interpreted
from pallas_kernels.attention.hopper_decode_registers import ENTRIES, SLOTS
from pallas_kernels.hopper_card import NUM_MULTIPROCESSORS

MAX_BLOCK_TOKENS = 2
"""Tokens a block attends for: with 8 query heads each, they fill the 16 rows of mma."""
FEW_PAGES = 12
"""Up to so many, one block reads them all: the windows of sliding layers."""
MODERATE_PAGES = 64
"""Up to so many, eight blocks are done before more loads in flight would pay."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was measured to be best."""

    splits: int
    """Blocks that share the keys of a row and kv head: 1, 2, 4 or 8, a cluster."""
    warpgroups: int
    """Of a block."""
    depth: int = 2
    """Pages on their way to a warpgroup."""
    shared: bool = True
    """Whether they wait in shared memory (cp.async), 16 KB each, and not in 32 registers a thread."""

    @classmethod
    def of(cls, num_blocks: int, most_pages: int, block_tokens: int) -> "Tuning":
        """For so many pairs of tokens x kv heads, each of which sees at most so many pages.

        Pages wait in registers for one token a row that may see more than MODERATE_PAGES, or more than FEW_PAGES in a
        batch too large for eight blocks a row and kv head; else in shared memory.

        H200, 2026-11-22, us a call: a window of 128 at batch 1, 8, 32, 128: 2.8, 3.0, 5.4, 14.6; 1024 keys: 3.7, 8.3,
        21.7, 73.8 (3.6 TB/s); 131,072 keys at batch 1: 78 (3.4 TB/s).
        """
        splits = 8 if most_pages > FEW_PAGES else 1
        while splits > 1 and num_blocks * splits > NUM_MULTIPROCESSORS:
            splits //= 2
        if block_tokens > 1:
            return cls(splits, warpgroups=2)
        small = num_blocks * splits > 2 * NUM_MULTIPROCESSORS  # several blocks to a multiprocessor
        if most_pages <= FEW_PAGES:
            return cls(splits, warpgroups=4 if num_blocks <= 16 else 1 if small else 2, depth=1)
        if splits == 8 and most_pages <= MODERATE_PAGES:
            return cls(splits, warpgroups=2, depth=1)
        many = num_blocks * splits > NUM_MULTIPROCESSORS
        return cls(splits, warpgroups=1 if small else 2 if many else 4, shared=False)


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
    batch, num_tokens, num_kv_heads = queries.shape[:3]
    block_tokens = min(num_tokens, MAX_BLOCK_TOKENS)
    num_pairs = -(-num_tokens // block_tokens)
    tuning = tuning or Tuning.of(batch * num_pairs * num_kv_heads, most_pages, block_tokens)
    if interpret:
        tuning = dataclasses.replace(tuning, splits=1)
    make_parts = interpreted if interpret else hardware
    parts = make_parts(block_tokens, **dataclasses.asdict(tuning))
    kernel = plgpu.kernel(
        functools.partial(_block, tuning=tuning, parts=parts, block_tokens=block_tokens),
        out_type=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        grid=(batch, num_pairs, num_kv_heads),
        grid_names=("row", "pair", "head"),
        cluster=(tuning.splits,) if tuning.splits > 1 else (),
        cluster_names=("split",) if tuning.splits > 1 else (),
        num_threads=tuning.warpgroups,
        thread_name="warpgroup",
        scratch_types={
            "memory": {name: plgpu.SMEM(shape, jnp.float32) for name, shape in parts.memory.items()},
            "arrived": plgpu.Barrier(num_arrivals=tuning.warpgroups),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="attention_decode",
    )
    return kernel(
        queries, keys, values, page_table.astype(jnp.int32), first.astype(jnp.int32), last.astype(jnp.int32), sinks
    )


def _block(
    queries,
    keys,
    values,
    table,
    first,
    last,
    sinks,
    out,
    *,
    memory,
    arrived,
    tuning: Tuning,
    parts: Parts,
    block_tokens,
) -> None:
    row, pair, head = lax.axis_index("row"), lax.axis_index("pair"), lax.axis_index("head")
    warpgroup = lax.axis_index("warpgroup")
    split = lax.axis_index("split") if tuning.splits > 1 else 0
    workers = tuning.splits * tuning.warpgroups
    worker = split * tuning.warpgroups + warpgroup
    table_length, depth = table.shape[1], tuning.depth

    # All that is small is asked for at once; of a long table, the pages if the first that is seen is page 0.
    sink = parts.load_sinks(sinks.at[head])
    entries = parts.load_entries(table.at[row]) if table_length <= ENTRIES else None
    guessed = (
        []
        if entries is not None
        else [table[row, jnp.minimum(worker + step * workers, table_length - 1)] for step in range(2 * depth)]
    )
    num_tokens = queries.shape[1]
    tokens = [block_tokens * pair + i for i in range(block_tokens)]
    clamped = [jnp.minimum(token, num_tokens - 1) for token in tokens]
    bounds = [
        (first[row, at], jnp.where(token < num_tokens, last[row, at], -1))
        for token, at in zip(tokens, clamped, strict=True)
    ]
    begin, num_pages = _visible_pages(bounds)
    num_own = lax.div(num_pages - worker + workers - 1, workers)

    def page_of(step):
        return begin + worker + step * workers

    def number_of(step):
        page = jnp.minimum(page_of(step), table_length - 1)
        number = table[row, page] if entries is None else parts.entry(entries, page)
        return jnp.clip(number, 0, keys.shape[0] - 1)

    def read_first_numbers():
        if entries is not None:
            return [number_of(step) for step in range(2 * depth)]

        def read():
            return [table[row, jnp.minimum(page_of(step), table_length - 1)] for step in range(2 * depth)]

        numbers = lax.cond(begin == 0, lambda: guessed, read)
        return [jnp.clip(number, 0, keys.shape[0] - 1) for number in numbers]

    def place_of(place):
        return memory["pages"].at[warpgroup, place] if "pages" in memory else None

    def load(step, number, place):
        return parts.load_page(step < num_own, keys.at[number, head], values.at[number, head], place_of(place))

    first_numbers = read_first_numbers()
    fragment = parts.load_queries(*[queries.at[row, at, head] for at in clamped])
    pages = [load(step, first_numbers[step], step) for step in range(depth)]
    numbers = first_numbers[depth:]

    def round_(index, carry):
        state, pages, numbers = carry
        pages, numbers = list(pages), list(numbers)
        for place in range(depth):
            step = index * depth + place
            base = page_of(step) * SLOTS
            relative = [(low - base, high - base) for low, high in bounds]
            attend = functools.partial(parts.attend, fragment, pages[place], place_of(place), relative)
            state = lax.cond(step < num_own, attend, lambda state: state, state)
            pages[place] = load(step + depth, numbers[place], place)
            numbers[place] = number_of(step + 2 * depth)
        return state, tuple(pages), tuple(numbers)

    rounds = lax.div(num_own + depth - 1, depth)
    state, _, _ = lax.fori_loop(0, rounds, round_, (parts.start(), tuple(pages), tuple(numbers)))
    parts.store(state, memory, warpgroup)
    plgpu.barrier_arrive(arrived)

    @pl.when(warpgroup == 0)
    def merge():
        plgpu.barrier_wait(arrived)
        targets = [out.at[row, at, head] for at in clamped]
        valid = [token < num_tokens for token in tokens]
        parts.finish(memory, sink, targets, valid, split)


def _visible_pages(bounds: list[tuple[Array, Array]]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The first page that some token sees, and how many pages it is from there to the last one."""
    far = jnp.int32(2**30)
    low = functools.reduce(jnp.minimum, [jnp.where(first <= last, first, far) for first, last in bounds])
    high = functools.reduce(jnp.maximum, [jnp.where(first <= last, last, -1) for first, last in bounds])
    begin = jnp.where(high < 0, 0, lax.div(low, SLOTS))
    return begin, jnp.where(high < 0, 0, lax.div(high, SLOTS) + 1 - begin)
