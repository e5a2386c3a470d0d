"""The commands `convert`, `inspect`, `verify` and `export`: their arguments, and what they run.

gptoss_jax/cli.py hangs them into `gptoss-jax`; `python -m convert` is `gptoss-jax convert`. JAX and Orbax are imported
inside the run functions, so that --help is instant.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from gptoss_jax.errors import GptOssError, out_of_memory

BAD_INPUT = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other bad input does."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"gptoss-jax: {message}: {self.prog}: see {self.prog} --help\n")


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Convert a published safetensors checkpoint to a sharded Orbax checkpoint."
    parser.add_argument("source", help="a checkpoint folder, or hf://owner/name")
    parser.add_argument("destination", type=Path, help="the directory to make")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted conversion, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace a converted checkpoint that is there")
    parser.add_argument("--quantize", action="store_true", help="quantize bfloat16 experts to MXFP4")


def run_convert(options: argparse.Namespace) -> int:
    from convert.converter import convert

    manifest = convert(
        options.source,
        options.destination,
        resume=options.resume,
        overwrite=options.overwrite,
        quantize=options.quantize,
        progress=sys.stderr,
    )
    treatment = "experts quantized to MXFP4" if manifest.quantized else "bytes as published"
    _say(f"{options.destination}: {len(manifest.sha256)} parameters, {manifest.layout} layout, {treatment}")
    return 0


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Describe a checkpoint, published or converted: parameters, bytes, what it fits into."
    parser.add_argument("path", help="a checkpoint folder or a converted directory")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_inspect(options: argparse.Namespace) -> int:
    from convert.inspect import inspect

    report = inspect(options.path)
    _say(json.dumps(report.to_json(), indent=2) if options.json else str(report))
    return 0


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Without --golden, which needs a model: gptoss_jax/cli.py adds it."""
    parser.description = "Compare a converted checkpoint with its source, or without one with its own checksums."
    parser.add_argument("checkpoint", type=Path, help="a converted directory")
    parser.add_argument("source", nargs="?", help="the folder it was converted from")


def run_verify(options: argparse.Namespace) -> int:
    from convert.verify import verify

    verified = verify(options.checkpoint, options.source, progress=sys.stderr)
    _say(
        f"{options.checkpoint}: {verified.num_arrays} parameters, {verified.num_bytes:,} bytes equal {verified.against}"
    )
    return 0


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a converted checkpoint, or a fine-tuned one, as safetensors in a published layout."
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a converted directory or a fine-tuning run")
    parser.add_argument("destination", type=Path, metavar="OUT", help="the directory to make")
    parser.add_argument("--layout", choices=("hf", "original"), default="hf", help="Hugging Face's, or original/")
    parser.add_argument("--dtype", choices=("mxfp4", "bf16"), default="mxfp4", help="of the experts' matrices")
    parser.add_argument("--peft", action="store_true", help="write a run's LoRA alone, as a PEFT adapter")
    parser.add_argument("--base", type=Path, help="the checkpoint a run started from, if it is not where it was")
    parser.add_argument("--step", type=int, help="which of a run's checkpoints (default: the last)")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    parser.add_argument(
        "--max-shard-size", type=_num_bytes, default="5GB", metavar="SIZE", help="of a file: 5GB (the default), 500MB"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_export(options: argparse.Namespace) -> int:
    from convert.export import export

    exported = export(
        options.checkpoint,
        options.destination,
        layout=options.layout,
        dtype=options.dtype,
        peft=options.peft,
        overwrite=options.overwrite,
        max_shard_bytes=options.max_shard_size,
        base=options.base,
        step=options.step,
        progress=sys.stderr,
    )
    _say(json.dumps(exported.to_json(), indent=2) if options.json else str(exported))
    return 0


def _num_bytes(text: str) -> int:
    """A size as Hugging Face's programs take it."""
    match = re.fullmatch(r"([1-9]\d*)(MB|GB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return int(match[1]) * {"MB": 10**6, "GB": 10**9}[match[2]]


def run_guarded(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; print a bad input in one line, and turn it into an exit code."""
    try:
        return run(options)
    except GptOssError as error:
        sys.stderr.write(f"gptoss-jax: {error}\n")
        return BAD_INPUT
    except BrokenPipeError:  # nobody reads on: not the input's fault
        raise
    except OSError as error:
        if error.filename is None:  # about no file the user named: a bug
            raise
        sys.stderr.write(
            f"gptoss-jax: {error.strerror or error}: {error.filename}: check the path and its permissions\n"
        )
        return BAD_INPUT
    except RuntimeError as error:
        what = out_of_memory(error)
        if what is None:
            raise
        sys.stderr.write(
            f"gptoss-jax: {what}: a device: ask for less at a time, or split the model over more with --mesh; "
            "`gptoss-jax plan` says what fits\n"
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("gptoss-jax: interrupted\n")
        return INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m convert SOURCE DESTINATION`."""
    parser = Parser(prog="python -m convert", allow_abbrev=False)
    add_convert_arguments(parser)
    return run_guarded(run_convert, parser.parse_args(arguments))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
