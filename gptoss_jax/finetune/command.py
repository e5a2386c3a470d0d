"""The command `gptoss-jax finetune`: its arguments, and the run. JAX is imported when it runs."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.cli_arguments import add_placement_arguments, mesh_of

if TYPE_CHECKING:
    from gptoss_jax.finetune.settings import FineTuning

# By option: the setting it stands for is its name; type, metavar, help.
_SETTINGS: dict[str, tuple[type, str, str]] = {
    "method": (str, "NAME", "lora, full, or qat: full with the experts rounded to MXFP4 as they are trained"),
    "rank": (int, "R", "of the adapters"),
    "targets": (str, "NAMES", "what has adapters, among attention,router,experts"),
    "steps": (int, "N", "updates (default: those of --epochs)"),
    "epochs": (float, "X", "times through the data (default: 1)"),
    "batch_size": (int, "N", "rows of packed conversations an update"),
    "accumulate": (int, "N", "parts of a batch computed one after the other"),
    "sequence_length": (int, "N", "tokens a row"),
    "optimizer": (str, "NAME", "adamw, adafactor, lion or sgd"),
    "learning_rate": (float, "X", "its peak"),
    "save_every": (int, "N", "updates between checkpoints"),
    "evaluate_every": (int, "N", "updates between evaluations"),
}
_SWITCHES = {"vocabulary_on_host": "embedding and unembedding in the host's memory: 2.3 GB less on the devices"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fine-tune a converted checkpoint on chat conversations (JSON lines) into a new directory, which gptoss-jax "
        "export turns into safetensors. docs/finetuning.md has the data's form and all settings."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a converted directory")
    parser.add_argument("data", type=Path, metavar="DATA", help="conversations, one JSON object a line")
    parser.add_argument("directory", type=Path, metavar="RUN", help="where checkpoints and metrics go")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="a JSON object of settings; options come first")
    for name, text in _SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=text)
    for name, (kind, metavar, text) in _SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="conversations to measure by")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of RUN")
    parser.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard as well")
    parser.add_argument("--json", action="store_true", help="print metrics as JSON lines on standard output")
    add_placement_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Train, with a line for each update."""
    from gptoss_jax.distributed import is_first
    from gptoss_jax.finetune.metrics import check_tensorboard, line
    from gptoss_jax.finetune.trainer import fine_tune

    if options.tensorboard:
        check_tensorboard()

    def show(metrics: dict[str, Any], steps: int) -> None:
        text = json.dumps(metrics) if options.json else line(metrics, steps)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    result = fine_tune(
        options.checkpoint,
        options.data,
        options.directory,
        settings_of(options),
        mesh=mesh_of(options),
        evaluation=options.evaluation,
        dtype=options.dtype,
        resume=options.resume,
        tensorboard=options.tensorboard,
        report=show,
    )
    if not options.json and is_first():
        sys.stdout.write(
            f"{result.step} updates are made; gptoss-jax export {options.directory} OUT writes safetensors\n"
        )
    return 0


def settings_of(options: argparse.Namespace) -> "FineTuning":
    """The file's settings, or those of the run that is resumed, or the defaults; the options' instead where given."""
    from gptoss_jax.finetune.runs import Description
    from gptoss_jax.finetune.settings import FineTuning

    if options.settings is not None:
        settings = FineTuning.read(options.settings)
    elif options.resume:
        settings = Description.read(options.directory).settings
    else:
        settings = FineTuning()
    given = {name: value for name in (*_SETTINGS, *_SWITCHES) if (value := getattr(options, name)) is not None}
    if "targets" in given:
        given["targets"] = tuple(given["targets"].split(","))
    if "steps" in given or "epochs" in given:  # one takes the place of the other
        settings = dataclasses.replace(settings, steps=None, epochs=FineTuning.epochs)
    return dataclasses.replace(settings, **given)
