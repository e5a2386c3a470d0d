"""The rows of a plan, one after the other, and what happens to one that does not fit."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from gptoss_jax import distributed
from gptoss_jax.bench import split
from gptoss_jax.bench.kernels import attention_row, expert_rows
from gptoss_jax.bench.plan import Plan
from gptoss_jax.bench.report import Row
from gptoss_jax.bench.roofline import Ceilings, Part
from gptoss_jax.bench.steps import decode_row, prefill_row
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import BenchError, DoesNotFit, out_of_memory
from gptoss_jax.generation.steps import DECODE_BUFFER
from gptoss_jax.model.transformer import Transformer


def check(plan: Plan, config: ModelConfig) -> None:
    """Raise BenchError for what no run could measure: before the weights are made, which takes a while."""
    for where, numbers, most in (
        ("--context", plan.contexts, config.max_context),
        ("--prefill", plan.prompts, config.max_context),
        ("--steps", [plan.steps], DECODE_BUFFER),
    ):
        if wrong := [number for number in numbers if not 1 <= number <= most]:
            raise BenchError(f"{wrong[0]} is out of range", where=where, fix=f"choose 1 to {most}")
    if not (plan.kernel_tokens or plan.prompts or (plan.batches and plan.contexts)):
        raise BenchError(
            "nothing to measure",
            where="--batch, --context and --prefill",
            fix="give --batch and --context, or --prefill, or --kernels",
        )


def measure(model: Transformer, name: str, ceilings: Ceilings, plan: Plan) -> Iterator[Row | DoesNotFit]:
    """The rows of a plan as they are measured, kernels first; in place of one that does not fit, why not.

    With `split`, a row is followed by those of the same step with a stage left out; with `collectives`, by one without
    the sums over devices.

    Raises BenchError for a plan that `check` refuses, or a model whose decoding gives no numbers.

    Example:
        >>> from gptoss_jax.bench.timing import ceilings
        >>> from gptoss_jax.bench.weights import random_model
        >>> from gptoss_jax.config import gpt_oss_20b
        >>> rows = list(measure(random_model(gpt_oss_20b()), "20b", ceilings(), Plan()))  # doctest: +SKIP
    """
    check(plan, model.config)
    part = functools.partial
    data = model.mesh.shape["data"]
    batches = [batch for batch in plan.batches if batch % data == 0]
    shapes = [{"batch": batch, "context": context} for context in plan.contexts for batch in batches]
    for batch in sorted(set(plan.batches) - set(batches)):
        yield DoesNotFit(f"{batch} rows do not divide", where=f"data = {data}", fix="leave this batch out")
    for num_tokens in plan.kernel_tokens:
        yield from _fitting(part(expert_rows, model, name, ceilings, num_tokens=num_tokens))
    if plan.kernel_tokens:
        for shape in shapes:
            for kind in sorted(set(model.config.layer_kinds)):
                yield from _fitting(part(attention_row, model, name, ceilings, kind, **shape))
    decoding, prefilling = decode_row, prefill_row
    if plan.split or plan.collectives:
        parts: Sequence[Part] = ("collectives",) if plan.collectives else split.PARTS
        split.compile_ahead(model, shapes, plan.prompts, steps=plan.steps, parts=parts)
        decoding, prefilling = part(split.decode_rows, parts=parts), part(split.prefill_rows, parts=parts)
    for shape in shapes:
        yield from _fitting(part(decoding, model, name, ceilings, steps=plan.steps, **shape))
    for num_tokens in plan.prompts:
        yield from _fitting(part(prefilling, model, name, ceilings, num_tokens=num_tokens))


def _fitting(rows: Callable[[], Any]) -> Iterator[Row | DoesNotFit]:
    """The row or rows, or the error that says why they do not fit into memory."""
    try:
        measured = rows()
    except DoesNotFit as error:
        yield error
    except jax.errors.JaxRuntimeError as error:
        what = out_of_memory(error)
        if what is None:
            raise
        too_much = DoesNotFit(f"out of memory ({what:.120})", where="the device", fix="leave this row out")
        if distributed.num_processes() > 1:  # the others may have had enough, and go on with this row
            raise too_much from error
        yield too_much
    else:
        yield from [measured] if isinstance(measured, Row) else measured
