"""`python -m pallas_kernels.tune`: measure candidates for the tables of `pallas_kernels.experts.tiles` on this GPU.

Done by hand, when a kernel or a card is new: nothing tunes itself at run time. Every candidate is compiled, compared
with the reference, and timed by the profiler (CUPTI) on random weights and tokens; the result is a table and the lines
to review and put into the module.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.experts import hopper_decode, hopper_layout, hopper_prefill, reference
from pallas_kernels.experts.tiles import DECODE_BEYOND, PREFILL_BEYOND, DecodeTiles, Tiling, prefill
from pallas_kernels.experts.weights import ExpertWeights
from pallas_kernels.mxfp4 import MXFP4

ALPHA, LIMIT = 1.702, 7.0
MAX_ERROR = 6e-3
"""||found - reference|| / ||reference||: the activations, the answers and the result are bfloat16."""
_INPUT_SETS = 3
_ITERATIONS = 10
_SCALES = (119, 121)
# The profiler counts kernels, and sees a command buffer as one.
_NO_COMMAND_BUFFERS: dict[str, str | bool] = {"xla_gpu_graph_min_graph_size": "1000000"}


class NoGPU(RuntimeError):
    """There is no GPU to measure on."""


class WrongResult(RuntimeError):
    """A candidate's answer is not the reference's."""


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of the expert layer."""

    candidates: Callable[[float], Sequence[Any]]
    """What may be best for so many rows an expert."""
    run: Callable[..., Array]
    """(x, weights, ids, routing, candidate) -> result."""
    tokens: tuple[int, ...]
    """The batches to measure unless told."""


def prefill_candidates(rows_per_expert: float) -> list[Tiling]:
    """The table's own tiling, wide ones, and ladders of widths around the mean.

    Example:
        >>> [tiling.widths for tiling in prefill_candidates(16.0)][:3]
        [(16, 24, 32), (16, 24, 32), (16, 24, 40)]
    """
    mean = 8 * math.ceil(rows_per_expert / 8)
    found = [prefill(rows_per_expert)]
    if mean <= 40:
        ladders = [(mean, mean + 8, mean + 16), (mean, mean + 8, mean + 24), (8, mean, mean + 16)]
        found += [Tiling(_ascending(widths), warpgroups, 3) for widths in ladders for warpgroups in (3, 2)]
    if 24 < mean <= 160:
        ladders = [(mean, mean + 8, mean + 16, mean + 32), (32, mean, mean + 16, mean + 32)]
        ladders += [(16, 32, mean, mean + 8, mean + 16, mean + 32)]
        found += [Tiling(_ascending(widths), 3) for widths in ladders]
    if mean > 24:
        found += [PREFILL_BEYOND]
    if mean > 96:
        found += [Tiling((64, 128, 192), 3), Tiling((64, 128, 192, 256), 2)]
    return list(dict.fromkeys(found))


def _ascending(widths: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(widths)))


def _run_prefill(x: Array, weights: Any, ids: Array, routing: Array, candidate: Tiling) -> Array:
    return hopper_prefill.experts(x, weights, ids, routing, alpha=ALPHA, limit=LIMIT, tiling=candidate)


def decode_candidates(rows_per_expert: float) -> list[DecodeTiles]:
    """The narrowest passes, cut and scaled each way, and wider ones where experts have more rows.

    Example:
        >>> [tiles.columns for tiles in decode_candidates(8.0)]
        [8, 8, 8, 8, 16, 16, 32]
    """
    found = [DecodeTiles(8, strips, scale_sums) for strips in (1, 2) for scale_sums in (True, False)]
    if rows_per_expert > 2:
        found += [DecodeTiles(16, 2, scale_sums) for scale_sums in (True, False)]
    if rows_per_expert > 4:
        found += [DECODE_BEYOND]
    return found


def _run_decode(x: Array, weights: Any, ids: Array, routing: Array, candidate: DecodeTiles) -> Array:
    return hopper_decode.experts(x, weights, ids, routing, alpha=ALPHA, limit=LIMIT, tiles=candidate)


FORMS = {
    "decode": Form(decode_candidates, _run_decode, tokens=(1, 2, 4, 8, 16, 32, 64)),
    "prefill": Form(prefill_candidates, _run_prefill, tokens=(65, 128, 256, 512, 1024, 2048, 8192)),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The expert layer's sizes, and how unevenly the experts are chosen."""

    num_experts: int = 32
    per_token: int = 4
    width: int = 2880
    expert_width: int = 2880
    skew: float = 0.0
    """Standard deviation of the experts' log popularity."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Microseconds of one candidate."""

    tokens: int
    rows_per_expert: float
    candidate: Any
    total_us: float
    kernels_us: dict[str, float]
    error: float


def random_weights(key: PRNGKeyArray, shape: Shape) -> ExpertWeights:
    """Random experts in the published format."""
    keys = iter(jax.random.split(key, 6))

    def matrix(rows: int, columns: int) -> MXFP4:
        dims = (shape.num_experts, rows, columns // 32)
        blocks = jax.random.bits(next(keys), (*dims, 16), jnp.uint8)
        return MXFP4(blocks, jax.random.randint(next(keys), dims, *_SCALES).astype(jnp.uint8))

    def bias(rows: int) -> Array:
        return jax.random.normal(next(keys), (shape.num_experts, rows), jnp.bfloat16)

    pairs = 2 * shape.expert_width
    return ExpertWeights(
        matrix(pairs, shape.width), bias(pairs), matrix(shape.width, shape.expert_width), bias(shape.width)
    )


def random_inputs(
    key: PRNGKeyArray, shape: Shape, num_tokens: int
) -> tuple[Float[Array, "T D"], Int[Array, "T A"], Float[Array, "T A"]]:
    """Tokens, the experts they chose and their weights."""
    of_x, of_popularity, of_choice, of_routing = jax.random.split(key, 4)
    popularity = shape.skew * jax.random.normal(of_popularity, (shape.num_experts,))
    scores = popularity + jax.random.gumbel(of_choice, (num_tokens, shape.num_experts))
    ids = jax.lax.top_k(scores, shape.per_token)[1].astype(jnp.int32)
    routing = jax.nn.softmax(jax.random.normal(of_routing, ids.shape), axis=-1)
    return jax.random.normal(of_x, (num_tokens, shape.width), jnp.bfloat16), ids, routing


def measure(form: Form, shape: Shape, tokens: Sequence[int], *, seed: int = 0) -> Iterator[Measurement | str]:
    """Measure every candidate for every number of tokens; a line of text for each that cannot run.

    Raises NoGPU where there is none, WrongResult for a candidate that runs and is wrong.
    """
    if jax.default_backend() != "gpu":
        raise NoGPU(f"tune measures on a GPU, and JAX finds only {jax.default_backend()!r} devices here")
    key = jax.random.key(seed)
    published = jax.jit(random_weights, static_argnums=1)(key, shape)
    weights = jax.jit(hopper_layout.pack)(published)
    inputs = jax.jit(random_inputs, static_argnums=(1, 2))
    expected = jax.jit(_expected)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs: list[tuple[int, list[tuple[Any, concurrent.futures.Future[Any]]]]] = []
        for num_tokens in tokens:
            arguments = jax.eval_shape(lambda num_tokens=num_tokens: random_inputs(key, shape, num_tokens))
            compiling = []
            for candidate in form.candidates(_rows_per_expert(shape, num_tokens)):
                try:
                    lowered = _lower(form, candidate, arguments, weights)
                except Unsupported as unsupported:
                    yield f"{num_tokens} tokens, {candidate}: {unsupported}"
                    continue
                compiling.append((candidate, pool.submit(lowered.compile, _NO_COMMAND_BUFFERS)))
            jobs.append((num_tokens, compiling))
        for num_tokens, compiling in jobs:
            keys = jax.random.split(jax.random.fold_in(key, num_tokens), _INPUT_SETS)
            x, ids, routing = inputs(keys[0], shape, num_tokens)
            answer = expected(x, published, ids, routing)
            argument_sets = [(x, weights, ids, routing)]
            for other in keys[1:]:
                x, ids, routing = inputs(other, shape, num_tokens)
                argument_sets.append((x, weights, ids, routing))
            for candidate, job in compiling:
                compiled = job.result()
                error = _relative_error(compiled(*argument_sets[0]), answer)
                if not error < MAX_ERROR:
                    raise WrongResult(f"{num_tokens} tokens, {candidate}: relative error {error:.2e}")
                total, kernels = _time(compiled, argument_sets)
                yield Measurement(num_tokens, _rows_per_expert(shape, num_tokens), candidate, total, kernels, error)


def table_lines(found: Sequence[Measurement]) -> list[str]:
    """The fastest candidate of each batch, up to midway (in ratio) to the next batch's rows an expert.

    Example:
        >>> def measured(rows, candidate, total):
        ...     return Measurement(int(rows), rows, candidate, total, {}, 0.0)
        >>> table_lines([measured(16.0, "A", 9.0), measured(16.0, "B", 8.0), measured(64.0, "C", 9.0)])
        ['(32, B),', 'beyond: C']
    """
    best: dict[float, Measurement] = {}
    for item in sorted(found, key=lambda item: item.rows_per_expert):
        known = best.get(item.rows_per_expert)
        if known is None or item.total_us < known.total_us:
            best[item.rows_per_expert] = item
    rows = list(best)
    ends = [_rounded(math.sqrt(low * high)) for low, high in itertools.pairwise(rows)]
    lines = [f"({end}, {best[row].candidate})," for end, row in zip(ends, rows, strict=False)]
    return [*lines, *(f"beyond: {best[row].candidate}" for row in rows[-1:])]


def _rounded(rows_per_expert: float) -> int | float:
    return round(rows_per_expert) if rows_per_expert >= 8 else round(rows_per_expert, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure candidate tilings of the expert kernels on this GPU, and print lines for their table."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=main.__doc__)
    defaults = Shape()
    parser.add_argument("--form", choices=sorted(FORMS), default="prefill")
    parser.add_argument("--experts", type=int, default=defaults.num_experts)
    parser.add_argument("--per-token", type=int, default=defaults.per_token)
    parser.add_argument("--width", type=int, default=defaults.width)
    parser.add_argument("--expert-width", type=int, default=defaults.expert_width)
    parser.add_argument("--skew", type=float, default=defaults.skew, help="0: all experts are chosen alike")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    given = parser.parse_args(arguments)
    form = FORMS[given.form]
    shape = Shape(given.experts, given.per_token, given.width, given.expert_width, given.skew)
    found: list[Measurement] = []
    try:
        for item in measure(form, shape, given.tokens or form.tokens, seed=given.seed):
            if isinstance(item, str):
                print(item)
            else:
                found.append(item)
                parts = ", ".join(f"{name} {us:.1f}" for name, us in item.kernels_us.items())
                print(f"{item.tokens:6d} tokens {item.total_us:9.1f} us  {item.candidate}  ({parts})", flush=True)
    except (NoGPU, WrongResult) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(["", "For pallas_kernels/experts/tiles.py:", *table_lines(found)]))
    if given.json:
        given.json.write_text(json.dumps([dataclasses.asdict(item) for item in found], indent=1))
    return 0


def _rows_per_expert(shape: Shape, num_tokens: int) -> float:
    return num_tokens * shape.per_token / shape.num_experts


def _expected(x: Array, weights: ExpertWeights, ids: Array, routing: Array) -> Array:
    return reference.experts(x.astype(jnp.float32), weights, ids, routing, alpha=ALPHA, limit=LIMIT)


def _lower(form: Form, candidate: Any, arguments: Any, weights: Any) -> jax.stages.Lowered:
    def layer(x: Array, weights: Any, ids: Array, routing: Array) -> Array:
        return form.run(x, weights, ids, routing, candidate)

    x, ids, routing = arguments
    return jax.jit(layer).lower(x, weights, ids, routing)


def _relative_error(found: Array, expected: Array) -> float:
    difference = found.astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))


def _time(compiled: Any, argument_sets: Sequence[tuple[Any, ...]]) -> tuple[float, dict[str, float]]:
    """Median microseconds of a call, and of each of its kernels by name."""
    from jax.experimental.mosaic.gpu import profiler

    timed: Any = profiler.Cupti().measure(compiled, aggregate=False, iterations=_ITERATIONS)
    calls: list[dict[str, float]] = []
    for arguments in argument_sets:
        _, iterations = timed(*arguments)
        for kernels in iterations or ():
            by_name: dict[str, float] = {}
            for name, milliseconds in kernels:
                short = name.removesuffix("_mosaic_gpu_kernel")
                by_name[short] = by_name.get(short, 0.0) + 1e3 * milliseconds
            calls.append(by_name)
    names = dict.fromkeys(name for call in calls for name in call)
    kernels_us = {name: statistics.median(call.get(name, 0.0) for call in calls) for name in names}
    return statistics.median(sum(call.values()) for call in calls), kernels_us


if __name__ == "__main__":
    sys.exit(main())
