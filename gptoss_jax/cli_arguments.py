"""Arguments that several commands share, and what they mean."""

import argparse
import secrets
from typing import Any

from gptoss_jax.harmony.conversation import REASONING_LEVELS

DTYPES = ("bfloat16", "float32")
_WAIT_SECONDS = 60.0


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    parser.add_argument("--reasoning", choices=REASONING_LEVELS, default="medium", help="effort (default: medium)")
    parser.add_argument(
        "--max-new-tokens",
        type=_at_least_one,
        default=max_new_tokens,
        metavar="N",
        help="bound on one answer, reasoning included (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default: 1, all)")
    parser.add_argument("--seed", type=int, metavar="N", help="for the same answer again (default: a random one)")


def add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    add_mesh_argument(parser)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of all but the experts")
    add_process_arguments(parser)


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", metavar="AXES", help="devices, as in expert=2,tensor=1 (default: one device)")


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes", "The same command for each, on one host or many; docs/multi-process.md says how."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 waits for the others")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 on")
    group.add_argument(
        "--wait", type=float, default=_WAIT_SECONDS, metavar="SECONDS", help="how long for the others (default: 60)"
    )


def sampling_of(options: argparse.Namespace) -> Any:
    """A `Sampling` whose seed is always known, so that an answer can be had again."""
    from gptoss_jax.generation.sampling import Sampling

    seed = secrets.randbits(32) if options.seed is None else options.seed
    return Sampling(temperature=options.temperature, top_p=options.top_p, seed=seed)


def mesh_of(options: argparse.Namespace) -> Any:
    """The mesh that `--mesh expert=2,tensor=1` describes; None without it."""
    from gptoss_jax.sharding import make_mesh, parse_axes

    return None if options.mesh is None else make_mesh(**parse_axes(options.mesh), devices=None)


def _at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number
