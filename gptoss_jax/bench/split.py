"""Rows of --split: the same step again with a stage left out, and the table of what each stage costs.

A stage costs what the step gets shorter by without it, launches and the gaps around them included. What stands in for
it, and what goes with it, is in `stand_ins`.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.bench.launches import count, program_launches
from gptoss_jax.bench.report import Row
from gptoss_jax.bench.roofline import STAGES, Ceilings, Number, Part, Work, prefill_work, stages
from gptoss_jax.bench.stand_ins import alone, without
from gptoss_jax.bench.steps import decode_row, lowered_decode, prefill_row, random_cache, with_lengths
from gptoss_jax.bench.timing import measure
from gptoss_jax.errors import BenchError, DoesNotFit
from gptoss_jax.generation.generate import cache_room, chunk_size
from gptoss_jax.generation.steps import prefill
from gptoss_jax.model.cache import Cache
from gptoss_jax.model.transformer import Transformer, flattened
from gptoss_jax.sharding import place

LeftOut = Part | Literal["generate"]
"""A stage, or every stage at once. Of a prefill, "generate" is what that function does around the program: the cache
made, the first token chosen and fetched; rows of a prefill that leave a stage out leave that out too."""

PARTS: tuple[Part, ...] = (*STAGES, "everything")
_COLUMNS = ("generate", *STAGES)
_WIDTH = 11
_HEAD_WIDTH = 31


def decode_rows(
    model: Transformer,
    name: str,
    ceilings: Ceilings,
    *,
    batch: int,
    context: int,
    steps: int,
    parts: Sequence[Part],
) -> list[Row]:
    """The ordinary row, and one for each part left out: all stages, and each."""
    rows = []
    for part in (None, *parts):
        with _variant(model, part) as variant:
            row = decode_row(variant, name, ceilings, batch=batch, context=context, steps=steps, left_out=part)
        rows.append(row)
    return rows


def prefill_rows(
    model: Transformer, name: str, ceilings: Ceilings, *, num_tokens: int, parts: Sequence[Part]
) -> list[Row]:
    """The ordinary row, one of the program `prefill` alone, and that with each part left out: all stages, and each."""
    rows = [prefill_row(model, name, ceilings, num_tokens=num_tokens)]
    for part in (None, *parts):
        with _variant(model, part) as variant:
            rows.append(_program_row(variant, name, ceilings, num_tokens=num_tokens, part=part))
    return rows


def compile_ahead(
    model: Transformer,
    shapes: Sequence[dict[str, int]],
    prompts: Sequence[int],
    *,
    steps: int,
    parts: Sequence[Part],
) -> None:
    """Compile every program that `decode_rows` and `prefill_rows` will run, as many at a time as there are processors.

    What cannot be compiled is left to them to report. The shapes' caches are made on the way: the rows' `peak_bytes`
    are of all of them.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = []
        for part in (None, *parts):
            with _variant(model, part) as variant:
                for shape in shapes:
                    with contextlib.suppress(DoesNotFit, jax.errors.JaxRuntimeError):
                        waiting.append(pool.submit(lowered_decode(variant, steps=steps, **shape).compile))
                for num_tokens in prompts:
                    with contextlib.suppress(DoesNotFit, jax.errors.JaxRuntimeError):
                        programs = _Prompt.of(variant, num_tokens).lowered().values()
                        waiting += [pool.submit(each.compile) for each in programs]
        wait(waiting)


@contextlib.contextmanager
def _variant(model: Transformer, part: Part | None) -> Iterator[Transformer]:
    if part is None:
        yield model
    elif part == "collectives":
        with alone(model) as variant:
            yield variant
    else:
        with without(model, stages(part)) as variant:
            yield variant


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A random prompt in the chunks that `generate` reads it in, on the device, and the model to read it with."""

    passed: Any
    cache: Cache
    chunks: list[Any]

    @classmethod
    def of(cls, model: Transformer, num_tokens: int, *, seed: int = 0) -> "_Prompt":
        rows = model.mesh.shape["data"]  # all but one are empty, as `generate` pads
        cache = random_cache(model, batch=rows, room=cache_room(num_tokens, model.config.max_context), seed=seed)
        tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, num_tokens, np.int32)
        chunks = []
        for begin in range(0, num_tokens, cache.max_chunk):
            chunk = tokens[begin : begin + cache.max_chunk]
            padding = chunk_size(chunk.size, cache.max_chunk) - chunk.size
            padded = np.pad(chunk[None], ((0, rows - 1), (0, padding)))
            chunks.append((padded, np.pad(np.array([chunk.size], np.int32), (0, rows - 1))))
        return cls(flattened(model), with_lengths(cache, np.zeros(rows, np.int32)), place(chunks, model.mesh))

    @property
    def lengths(self) -> list[int]:
        """Of the chunks, padding included."""
        return [tokens.shape[1] for tokens, _ in self.chunks]

    def lowered(self) -> dict[int, jax.stages.Lowered]:
        """The program of each length of chunk."""
        chunks = dict(zip(self.lengths, self.chunks, strict=True))
        return {length: prefill.lower(self.passed, self.cache, *chunk) for length, chunk in chunks.items()}


def _program_row(model: Transformer, name: str, ceilings: Ceilings, *, num_tokens: int, part: Part | None) -> Row:
    """Milliseconds from the first chunk's dispatch until the logits are there, on a cache full of random values."""
    prompt = _Prompt.of(model, num_tokens)
    cache, empty = prompt.cache, np.zeros(prompt.cache.batch, np.int32)
    logits: Any = None

    def run(ready: Cache) -> Any:
        nonlocal cache, logits
        cache = ready
        for chunk in prompt.chunks:
            logits, cache = prefill(prompt.passed, cache, *chunk)
        return logits, cache

    began = time.perf_counter()
    compiled = {length: lowered.compile() for length, lowered in prompt.lowered().items()}
    compile_s = time.perf_counter() - began
    times = measure(run, lambda: with_lengths(cache, empty))
    if not bool(jnp.isfinite(logits).all()):
        raise BenchError("logits that are no numbers", where="prefilling", fix="compare with impl='reference'")
    on_cpu = jax.default_backend() == "cpu"
    texts = [compiled[length].as_text() or "" for length in prompt.lengths]
    return Row.of(
        name,
        "prefill",
        prefill_work(model.config, num_tokens=num_tokens, without=stages(part)),
        ceilings,
        times,
        batch=1,
        context=num_tokens,
        num_tokens=num_tokens,
        left_out="generate" if part is None else part,
        launches=None if on_cpu else sum(count(program_launches(text)) for text in texts),
        compile_s=compile_s,
    )


def table(rows: Sequence[Row], ceilings: Ceilings) -> list[str]:
    """For each step that was measured without its stages: what each of them costs, in microseconds and in launches.

    `sum` is of all stages, `rest` the step without any of them, `differs` what the two lack of the whole: stages that
    overlap, and stand-ins that cost something. The floors are those of the stages' own bytes and operations.
    """
    steps: dict[tuple[str, int, int], dict[str | None, Row]] = {}
    for row in rows:
        if row.phase != "kernel":
            steps.setdefault((row.phase, row.batch, row.context), {})[row.left_out] = row
    head = f"{'phase':<9} {'batch':>6} {'context':>8}     "
    cells = ("whole", *_COLUMNS, "sum", "rest", "differs")
    lines = [head.ljust(_HEAD_WIDTH) + " ".join(f"{cell:>{_WIDTH}}" for cell in cells)]
    for (phase, batch, context), found in steps.items():
        if "everything" in found:
            step = f"{phase:<9} {batch:>6} {context:>8} "
            for label, numbers in _costs(found, ceilings):
                shown = ["-" if number is None else f"{number:.0f}" for number in numbers]
                lines.append((step + label).ljust(_HEAD_WIDTH) + " ".join(f"{cell:>{_WIDTH}}" for cell in shown))
                step = " " * len(step)
    return lines


def shares(rows: Sequence[Row]) -> list[str]:
    """For each step that was measured without its sums over devices: what they take of it, of a prefill's program."""
    whole = {(row.phase, row.batch, row.context): row for row in rows if row.left_out in (None, "generate")}
    lines = []
    for row in rows:
        if row.left_out == "collectives":
            step = whole[row.phase, row.batch, row.context].ms
            lines.append(
                f"sums over devices, {row.phase}, batch {row.batch}, context {row.context}: "
                f"{1e3 * (step - row.ms):.0f} us, {1 - row.ms / step:.1%}"
            )
    return lines


def _costs(found: dict[str | None, Row], ceilings: Ceilings) -> Iterator[tuple[str, list[Number | None]]]:
    whole, rest = found[None], found["everything"]
    base = found.get("generate", whole)

    def line(numbers: dict[str | None, Number], first: Number | None) -> list[Number | None]:
        costs = [numbers[stage] for stage in STAGES]
        around = None if base is whole or first is None else first - numbers["base"]
        total = sum(costs) + (around or 0)
        known = numbers["base"] if first is None else first
        return [first, around, *costs, total, numbers["rest"], known - total - numbers["rest"]]

    times = {stage: 1e3 * (base.ms - found[stage].ms) for stage in STAGES}
    yield "us", line({**times, "base": 1e3 * base.ms, "rest": 1e3 * rest.ms}, 1e3 * whole.ms)
    works = {stage: _work(base) - _work(found[stage]) for stage in STAGES}
    floors = {stage: 1e3 * ceilings.floor_ms(work) for stage, work in works.items()}
    yield "floor", [1e3 * whole.floor_ms, None, *floors.values(), sum(floors.values()), 1e3 * rest.floor_ms, None]
    if base.launches is not None:
        launches = {stage: base.launches - (found[stage].launches or 0) for stage in STAGES}
        yield "launches", line({**launches, "base": base.launches, "rest": rest.launches or 0}, whole.launches)


def _work(row: Row) -> Work:
    return Work(row.bytes, row.flops)
