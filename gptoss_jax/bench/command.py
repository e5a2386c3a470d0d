"""The command `gptoss-jax bench`: its arguments, and the run. JAX is imported when it runs."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.bench.plan import Plan
from gptoss_jax.cli_arguments import add_mesh_argument, add_process_arguments, mesh_of
from gptoss_jax.errors import BenchError, DoesNotFit

if TYPE_CHECKING:
    from gptoss_jax.config import ModelConfig
    from gptoss_jax.model.transformer import Transformer

_MODELS = ("20b", "120b", "tiny")
_METHODS = ("lora", "full", "qat")
_GB = 10**9
_OF_STEPS = ("batch", "context", "prefill", "steps", "kernels", "split", "collectives", "plot")
_OF_TRAINING = ("sequence", "rows", "rank", "targets", "vocabulary_on_host", "optimizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure this machine's ceilings, then decoding and prefilling against them: with a checkpoint's weights, or "
        "with random ones of a published shape, made on the device."
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CKPT", help="a converted directory")
    parser.add_argument("--model", choices=_MODELS, help="random weights of this shape (default without CKPT: 20b)")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers, for a quick look")
    plan = Plan()
    for name, default, text in (
        ("batch", plan.batches, "rows decoded at once"),
        ("context", plan.contexts, "tokens held by each row when decoding begins"),
        ("prefill", plan.prompts, "lengths of the prompts read"),
    ):
        shown = ",".join(map(str, default))
        parser.add_argument(
            f"--{name}", type=_numbers_or_none, metavar="N,...", help=f"{text}; 0 for none (default: {shown})"
        )
    parser.add_argument("--steps", type=int, metavar="N", help=f"tokens a dispatch (default: {plan.steps})")
    parser.add_argument("--kernels", action="store_true", help="also the kernels alone, over token counts")
    parser.add_argument("--split", action="store_true", help="also what each stage costs: every row without it")
    parser.add_argument("--collectives", action="store_true", help="also what the sums over devices cost a step")
    parser.add_argument("--memory-limit-gb", type=float, metavar="G", help="hold the process to this much GPU memory")
    training = parser.add_argument_group(
        "training", "With --train, updates of a fine-tuning with random weights instead; defaults are finetune's."
    )
    training.add_argument("--train", choices=_METHODS, metavar="METHOD", help=f"one of {', '.join(_METHODS)}")
    training.add_argument("--sequence", type=_numbers, metavar="N,...", help="tokens a row")
    training.add_argument("--rows", type=int, metavar="N", help="rows an update (default: 1)")
    training.add_argument("--rank", type=int, metavar="R", help="of the adapters")
    training.add_argument("--targets", metavar="NAMES", help="what has adapters, among attention,router,experts")
    training.add_argument("--vocabulary-on-host", action="store_true", help="embedding and unembedding off the GPU")
    training.add_argument("--optimizer", metavar="NAME", help="adamw, adafactor, lion or sgd")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as one object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline (.png, .svg, .pdf)")
    add_mesh_argument(parser)
    add_process_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, and write the files asked for."""
    for path in (options.json, options.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise BenchError("no such folder", where=str(path), fix="make it first")
        if path is not None and path.is_dir():
            raise BenchError("a folder", where=str(path), fix="name a file in it")
    if options.checkpoint is not None and options.model is not None:
        raise BenchError("a checkpoint and --model", where="--model", fix="give one of the two")
    training = options.train is not None
    for name in _OF_STEPS if training else _OF_TRAINING:
        value = getattr(options, name)
        if value is not None and value is not False:  # 0 was given, and is refused too
            option, joined = f"--{name.replace('_', '-')}", "with" if training else "without"
            raise BenchError(f"{option} {joined} --train", where=option, fix=f"leave out {option}")

    if options.split and options.collectives:
        raise BenchError("--split and --collectives", where="--collectives", fix="give one of the two")

    from gptoss_jax.bench import memory, plot

    if options.plot is not None:
        plot.check(options.plot)
    limit = None if options.memory_limit_gb is None else memory.hold(options.memory_limit_gb * _GB)

    if training:
        return _train(options, limit)

    from gptoss_jax.bench import split
    from gptoss_jax.bench.kernels import TOKEN_COUNTS
    from gptoss_jax.bench.report import Table, surroundings, write
    from gptoss_jax.bench.roofline import Ceilings
    from gptoss_jax.bench.suite import check, measure
    from gptoss_jax.bench.timing import ceilings
    from gptoss_jax.compilation import enable_cache
    from gptoss_jax.distributed import is_first
    from gptoss_jax.sharding import parse_axes

    name, config = _config(options)
    plan = Plan(
        **_given(batches=options.batch, contexts=options.context, prompts=options.prefill, steps=options.steps),
        kernel_tokens=TOKEN_COUNTS if options.kernels else (),
        split=options.split,
        collectives=options.collectives,
    )
    check(plan, config)
    sizes = parse_axes(options.mesh) if options.mesh else {}
    if plan.collectives and sizes.get("expert", 1) * sizes.get("tensor", 1) == 1:
        raise BenchError("no sums over devices", where="--collectives", fix="split the model: --mesh expert=2, say")
    enable_cache()
    report = surroundings(_command_line(sys.argv[1:]))
    rates = ceilings()
    report["ceilings"] = dataclasses.asdict(rates)
    table, rows = Table(), []
    table.line(_head(report))
    model = _model(options, config)
    report |= {"weights": "random" if options.checkpoint is None else "checkpoint", "left_out": []}
    table.header()
    devices = model.mesh.size
    report["mesh"] = dict(model.mesh.shape)
    together = Ceilings(devices * rates.read_bytes_per_s, devices * rates.dense_flops_per_s)
    for row in measure(model, name, together, plan):
        if isinstance(row, DoesNotFit):
            report["left_out"].append(str(row))
            table.line(f"left out: {row}")
        else:
            rows.append(row)
            if row.left_out is None:
                table.row(row)
        if limit is not None:
            report["memory"] = memory.held(limit)
        if options.json is not None and is_first():  # after each row: a run that is cut short leaves what it had
            write(options.json, report, rows)
    if plan.split:
        for line in split.table(rows, together):
            table.line(line)
    if plan.collectives:
        for line in split.shares(rows):
            table.line(line)
    table.line(f"compiling took {sum(row.compile_s or 0 for row in rows):.1f} s")
    if limit is not None:
        sizes = (f"{key.removesuffix('_bytes')} {value / _GB:.2f}" for key, value in report["memory"].items())
        table.line(f"memory, GB: {', '.join(sizes)}")
    if options.plot is not None and rows and is_first():
        plot.draw(options.plot, rows, together, title=f"gpt-oss {name}, {report['device']}")
    return 0


def _train(options: argparse.Namespace, limit: dict[str, int] | None) -> int:
    """Measure updates, a row for each length."""
    from gptoss_jax.bench import memory
    from gptoss_jax.bench.report import Table, surroundings, write
    from gptoss_jax.bench.roofline import Ceilings
    from gptoss_jax.bench.timing import ceilings
    from gptoss_jax.bench.training import Trainer
    from gptoss_jax.compilation import enable_cache
    from gptoss_jax.distributed import is_first
    from gptoss_jax.finetune.settings import FineTuning
    from gptoss_jax.sharding import make_mesh

    if options.checkpoint is not None:
        raise BenchError("a checkpoint and --train", where="--train", fix="name a --model: the weights are random")
    name, config = _config(options)
    enable_cache()
    settings = FineTuning(
        method=options.train,
        batch_size=1 if options.rows is None else options.rows,
        **_given(
            rank=options.rank,
            vocabulary_on_host=options.vocabulary_on_host,
            targets=None if options.targets is None else tuple(options.targets.split(",")),
            optimizer=options.optimizer,
        ),
    )
    report = surroundings(_command_line(sys.argv[1:]))
    rates = ceilings()
    mesh = mesh_of(options) or make_mesh()
    report |= {"ceilings": dataclasses.asdict(rates), "mesh": dict(mesh.shape)}
    together = Ceilings(mesh.size * rates.read_bytes_per_s, mesh.size * rates.dense_flops_per_s)
    table, rows = Table(), []
    table.line(_head(report))
    trainer = Trainer(config, name, settings, mesh)
    for length in options.sequence or (settings.sequence_length,):
        rows.append(trainer.row(sequence_length=length, ceilings=together))
        table.line(str(rows[-1]))
        if limit is not None:
            report["memory"] = memory.held(limit)
            table.line(
                f"memory, GB: {', '.join(f'{key} {value / _GB:.2f}' for key, value in report['memory'].items())}"
            )
        if options.json is not None and is_first():
            write(options.json, report, rows)
    return 0


def _command_line(arguments: Sequence[str]) -> str:
    """The command as another machine would be given it: of a file elsewhere, the name without its folders."""
    return shlex.join(["gptoss-jax", *(Path(word).name if Path(word).is_absolute() else word for word in arguments)])


def _config(options: argparse.Namespace) -> "tuple[str, ModelConfig]":
    """The architecture, and what its rows are called."""
    from convert.synthetic import MODELS
    from gptoss_jax.config import ModelConfig
    from gptoss_jax.manifest import CONFIG, read_manifest

    if options.checkpoint is None:
        name = options.model or "20b"
        config = MODELS[name]()
    else:
        read_manifest(options.checkpoint)
        config = ModelConfig.read(options.checkpoint / CONFIG)
        name = next((name for name, make in MODELS.items() if make() == config), options.checkpoint.name)
    if options.layers is None:
        return name, config
    if options.checkpoint is not None:
        raise BenchError("a checkpoint and --layers", where="--layers", fix="give one of the two")
    if not 1 <= options.layers <= config.num_layers:
        raise BenchError(f"{options.layers} layers", where="--layers", fix=f"choose 1 to {config.num_layers}")
    return f"{name}/{options.layers}", config.first_layers(options.layers)


def _model(options: argparse.Namespace, config: "ModelConfig") -> "Transformer":
    if options.checkpoint is not None:
        from gptoss_jax.checkpoint import load

        return load(options.checkpoint, mesh=mesh_of(options))
    from gptoss_jax.bench.weights import random_model

    return random_model(config, mesh=mesh_of(options))


def _head(report: dict[str, Any]) -> str:
    rates = report["ceilings"]
    return (
        f"{report['device']}, driver {report['driver'] or '-'}, jax {report['versions']['jax']}, commit "
        f"{report['commit'] or '-'}, {report['date']}\n"
        f"ceilings: reads {rates['read_bytes_per_s'] / 1e12:.3g} TB/s, "
        f"dense bfloat16 {rates['dense_flops_per_s'] / 1e12:.4g} TFLOP/s"
    )


def _given(**options: Any) -> dict[str, Any]:
    """Those that were given: the others have the defaults of what they are for."""
    return {name: value for name, value in options.items() if value is not None}


def _numbers_or_none(text: str) -> tuple[int, ...]:
    """`1,8,32`; `0` is none."""
    return () if text == "0" else _numbers(text)


def _numbers(text: str) -> tuple[int, ...]:
    """`1,8,32`."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers") from error
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{min(numbers)} is less than 1")
    return numbers
