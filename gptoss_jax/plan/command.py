"""The command `gptoss-jax plan`: its arguments, and the run. JAX is imported when it runs."""

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING

from gptoss_jax.errors import PlanError

if TYPE_CHECKING:
    from gptoss_jax.config import ModelConfig
    from gptoss_jax.plan.topologies import Topology

_MODELS = ("20b", "120b", "tiny")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compile a model's decode step and prefill chunk for devices that need not be there, and say what one device "
        "needs and what it would take."
    )
    parser.add_argument("--model", choices=_MODELS, default="20b", help="the shape (default: 20b)")
    parser.add_argument(
        "--topology",
        default="present",
        metavar="NAME",
        help="v6e:2x4, h200:8, cpu:8 and more; a wrong one lists them (default: the devices present)",
    )
    parser.add_argument("--mesh", metavar="AXES", help="as in expert=4,tensor=2 (default: one device)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows decoded at once (default: 1)")
    parser.add_argument(
        "--context", type=int, default=8192, metavar="N", help="tokens that each row may hold (default: 8192)"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers, for a quick look")
    parser.add_argument("--search", action="store_true", help="rank the meshes over all devices of the topology")
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/cli.md)")


def run(options: argparse.Namespace) -> int:
    """Plan, and print the page or the object."""
    from convert.synthetic import MODELS

    config = MODELS[options.model]()
    _check(options, config)
    topology = _topology(options.topology)

    from gptoss_jax.plan.points import Planner
    from gptoss_jax.plan.report import Plan
    from gptoss_jax.plan.search import search
    from gptoss_jax.sharding import parse_axes

    if options.layers is not None:
        config = config.first_layers(options.layers)
    if options.search:
        answer = search(config, topology, batch=options.batch, context=options.context, progress=_progress)
    else:
        mesh = topology.mesh(**({} if options.mesh is None else parse_axes(options.mesh)))
        answer = Plan.of(
            Planner(config, topology, mesh, progress=_progress), batch=options.batch, context=options.context
        )
    if options.json:
        named = {"model": options.model, "layers": config.num_layers}
        sys.stdout.write(json.dumps(named | answer.to_json()) + "\n")
    else:
        sys.stdout.write(f"gpt-oss {options.model}, {config.num_layers} layers, {answer}\n")
    return 0


def _check(options: argparse.Namespace, config: "ModelConfig") -> None:
    """Raise PlanError for what nothing can be compiled for."""
    for where, number, most in (
        ("--batch", options.batch, None),
        ("--context", options.context, config.max_context),
        ("--layers", options.layers, config.num_layers),
    ):
        if number is not None and not 1 <= number <= (most or number):
            fix = "choose 1 or more" if most is None else f"choose 1 to {most}"
            raise PlanError(f"{number} is out of range", where=where, fix=fix)
    if options.search and options.mesh is not None:
        raise PlanError("--mesh and --search", where="--mesh", fix="give one of the two")


def _topology(name: str) -> "Topology":
    import jax

    from gptoss_jax.compilation import enable_cache
    from gptoss_jax.plan.topologies import MOST_CPUS, PRESENT, find

    if name == PRESENT:
        enable_cache()
    else:
        jax.config.update("jax_platforms", "cpu")  # an accelerator that is here is left alone
    kind, _, count = name.partition(":")
    if kind == "cpu" and count.isdecimal() and int(count) <= MOST_CPUS:
        with contextlib.suppress(RuntimeError):  # JAX runs already: `find` says whether it has as many
            jax.config.update("jax_num_cpu_devices", int(count))
    return find(name)


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"{line}\n")
