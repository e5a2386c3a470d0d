"""The command `gptoss-jax`: its arguments, and what each command runs.

Whatever is heavy (JAX, NumPy, harmony) is imported inside the commands, so that --help is instant. `convert`,
`inspect`, `verify` and `export` are convert/cli.py's, which also turns a bad input into one line and exit code 2.
"""

import argparse
import codecs
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.cli import (
    Parser,
    add_convert_arguments,
    add_export_arguments,
    add_inspect_arguments,
    add_verify_arguments,
    run_convert,
    run_export,
    run_guarded,
    run_inspect,
    run_verify,
)
from gptoss_jax.bench.command import add_arguments as add_bench_arguments
from gptoss_jax.bench.command import run as run_bench
from gptoss_jax.cli_arguments import (
    DTYPES,
    add_placement_arguments,
    add_sampling_arguments,
    mesh_of,
    sampling_of,
)
from gptoss_jax.cli_processes import run_together
from gptoss_jax.errors import CheckpointError, PromptError, ShardingError
from gptoss_jax.finetune.command import add_arguments as add_finetune_arguments
from gptoss_jax.finetune.command import run as run_finetune
from gptoss_jax.plan.command import add_arguments as add_plan_arguments
from gptoss_jax.plan.command import run as run_plan

_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended
_NUM_HARMONY_IDS = 201088


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 for a bad input. A bug is a traceback."""
    _replace_what_cannot_be_written()
    try:
        try:
            options = _parser().parse_args(arguments)
            return run_guarded(options.run, options)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads on, as in `gptoss-jax inspect | head`. Python flushes once more at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gptoss-jax", description="Run OpenAI's gpt-oss models in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gptoss-jax {version('gptoss-jax')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary, add_arguments, run in (
        ("demo", "convert a tiny trained model, and chat with it", _add_demo_arguments, _run_demo),
        ("convert", "published safetensors to a sharded Orbax checkpoint", add_convert_arguments, run_convert),
        ("inspect", "describe a checkpoint, published or converted", add_inspect_arguments, run_inspect),
        ("verify", "check a converted checkpoint, bit for bit or by the model's output", _add_verify, _run_verify),
        ("export", "a converted or fine-tuned checkpoint to safetensors", add_export_arguments, run_export),
        ("generate", "answer one prompt", _add_generate_arguments, _run_generate),
        ("chat", "talk, line by line", _add_chat_arguments, _run_chat),
        ("finetune", "train adapters or all weights on conversations", add_finetune_arguments, _run_finetune),
        ("bench", "measure decoding and prefilling against this machine's ceilings", add_bench_arguments, _run_bench),
        ("plan", "what a model would take on devices that need not be there", add_plan_arguments, run_plan),
    ):
        command = commands.add_parser(name, help=summary, allow_abbrev=False)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Convert, verify and restore a tiny trained model, and ask it four questions."
    parser.add_argument("--directory", type=Path, help="where to keep it (default: in the user's cache folder)")


def _run_demo(options: argparse.Namespace) -> int:
    from gptoss_jax import demo

    demo.run(options.directory, output=sys.stdout)
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add_verify_arguments(parser)
    parser.add_argument(
        "--golden", action="store_true", help="also compare the model's log-probabilities with the published ones"
    )
    add_placement_arguments(parser)


def _run_verify(options: argparse.Namespace) -> int:
    if options.golden:
        return run_together(_run_golden, options)
    told = options.mesh, options.coordinator, options.num_processes, options.process_id
    if options.dtype != DTYPES[0] or any(value is not None for value in told):
        where = "--mesh, --dtype, --coordinator, --num-processes, --process-id"
        raise ShardingError("no model to place", where=where, fix="add --golden, or leave them out")
    return run_verify(options)


def _run_golden(options: argparse.Namespace) -> int:
    import numpy as np

    from convert.golden import check, target_for
    from gptoss_jax import distributed
    from gptoss_jax.config import ModelConfig
    from gptoss_jax.harmony.encoding import encode
    from gptoss_jax.manifest import CONFIG, read_manifest
    from gptoss_jax.sharding import fetch

    read_manifest(options.checkpoint)
    target = target_for(ModelConfig.read(options.checkpoint / CONFIG))
    if distributed.is_first():
        run_verify(options)
    model = _load(options)
    num_rows = model.mesh.shape["data"]  # a batch must divide over it; the rows are equal

    def logits(tokens: list[int]) -> np.ndarray:
        return fetch(model(np.array([tokens] * num_rows, np.int32)), model.mesh)[0]

    report = check(logits, encode, target)
    print(report)
    if not report.passed:
        raise CheckpointError(
            "the log-probabilities are not the published ones",
            where=str(options.checkpoint),
            fix="compare it with its source (gptoss-jax verify CHECKPOINT SOURCE), and try --dtype float32",
        )
    return 0


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answer one prompt. Standard output gets the answer and nothing else; warnings and, on a terminal, the "
        "reasoning go to standard error."
    )
    parser.add_argument("checkpoint", type=Path, help="a converted directory")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to ask; - reads standard input")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the text as it stands, harmony's markers in it included, and print all that follows",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/cli.md)")
    add_sampling_arguments(parser, max_new_tokens=1024)
    add_placement_arguments(parser)


def _run_generate(options: argparse.Namespace) -> int:
    return run_together(_generate, options)


def _generate(options: argparse.Namespace) -> int:
    from gptoss_jax.distributed import is_first
    from gptoss_jax.generation.follow import dismiss, follow

    if not is_first():
        follow(_load(options))
        return 0
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt:
        raise PromptError("an empty prompt", where="--prompt", fix="give some text")

    from gptoss_jax.chat import Chat
    from gptoss_jax.harmony.encoding import encode

    sampling = sampling_of(options)
    began = time.perf_counter()
    model = _load(options)
    load_seconds = time.perf_counter() - began
    source = _RecordedStream()
    if options.raw:
        tokens = source(model, encode(prompt, special=True), sampling, max_new_tokens=options.max_new_tokens)
        events = _unparsed(tokens)
    else:
        events = Chat(
            model,
            reasoning=options.reasoning,
            sampling=sampling,
            max_new_tokens=options.max_new_tokens,
            max_tool_calls=0,
            generate=source,
        ).send(prompt)
    if options.json:
        report = source.report(list(events))
        report |= {"seed": sampling.seed, "timings": {"load_s": load_seconds, **source.timings()}}
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print_answer(events)
    dismiss()
    return 0


class _RecordedStream:
    """The engine's token stream, as a Chat takes it, that keeps what --json tells of it."""

    def __init__(self) -> None:
        self._prompt: list[int] = []
        self._tokens: list[Any] = []
        self._times: list[float] = []

    def __call__(self, model: Any, prompt: Sequence[int], sampling: Any, *, max_new_tokens: int) -> Iterator[Any]:
        from gptoss_jax.generation.follow import lead

        self._prompt = list(prompt)
        self._times.append(time.perf_counter())
        for token in lead(model, prompt, sampling, max_new_tokens=max_new_tokens):
            self._tokens.append(token)
            self._times.append(time.perf_counter())
            yield token

    def report(self, events: Sequence[Any]) -> dict[str, Any]:
        """What was read and written, given the events that the stream became."""
        from gptoss_jax.chat_events import Malformed, Text

        texts: dict[str, str] = {}
        for event in events:
            if isinstance(event, Text):
                texts[event.kind] = texts.get(event.kind, "") + event.text
        return {
            "prompt_ids": self._prompt,
            "ids": [token.id for token in self._tokens],
            "logprobs": [token.logprob for token in self._tokens],
            "text": texts,
            "warnings": [event.reason for event in events if isinstance(event, Malformed)],
            "finish_reason": self._tokens[-1].finish_reason,
        }

    def timings(self) -> dict[str, float | None]:
        """Seconds to the first token, and the rate after the second one: each of the two waits for a compilation.

        The rate is None for an answer of fewer than three tokens.
        """
        began, first, *_ = self._times
        second, *rest = self._times[2:] or [first]
        rate = len(rest) / (rest[-1] - second) if rest else None
        return {"first_token_s": first - began, "tokens_per_s": rate}


def _unparsed(tokens: Iterator[Any]) -> Iterator[Any]:
    """All the text, markers included, as one answer."""
    from gptoss_jax.chat_events import Text
    from gptoss_jax.harmony.encoding import token_bytes

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if text := decoder.decode(token_bytes(token.id)):
            yield Text("final", text)
    if text := decoder.decode(b"", final=True):
        yield Text("final", text)


def _print_answer(events: Iterator[Any]) -> None:
    """Write the answer to standard output and the rest to standard error, in turns that suit a terminal of both."""
    from gptoss_jax.chat_events import Done, Text
    from gptoss_jax.chat_terminal import Printer

    answer, asides = Printer(sys.stdout), Printer(sys.stderr)
    try:
        for event in events:
            match event:
                case Text("final" | "commentary"):
                    asides.end_section()
                    answer.write(event)
                case Text("analysis") if not asides.on_terminal:
                    pass
                case Done("stop" | "tool_limit"):  # the call that went over the limit of none has been shown
                    pass
                case _:
                    answer.end_section()
                    asides.write(event)
    finally:  # after Ctrl-C too: a terminal must not stay dim
        answer.end_section()
        asides.end_section()


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Talk to a model, one line a turn; /help lists what else it understands."
    parser.add_argument("checkpoint", type=Path, help="a converted directory")
    parser.add_argument("--instructions", "--system", metavar="TEXT", help="how the model shall behave")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each event")
    add_sampling_arguments(parser, max_new_tokens=4096)
    add_placement_arguments(parser)


def _run_chat(options: argparse.Namespace) -> int:
    return run_together(_chat, options)


def _chat(options: argparse.Namespace) -> int:
    from gptoss_jax import chat_terminal
    from gptoss_jax.chat import Chat
    from gptoss_jax.distributed import is_first
    from gptoss_jax.generation.follow import dismiss, follow

    if not is_first():
        follow(_load(options))
        return 0
    sampling = sampling_of(options)
    chat = Chat(
        _load(options),
        reasoning=options.reasoning,
        instructions=options.instructions,
        sampling=sampling,
        max_new_tokens=options.max_new_tokens,
    )
    chat_terminal.run(chat, json_lines=options.json)
    dismiss()
    return 0


def _run_finetune(options: argparse.Namespace) -> int:
    return run_together(run_finetune, options)


def _run_bench(options: argparse.Namespace) -> int:
    return run_together(run_bench, options)


def _load(options: argparse.Namespace) -> Any:
    """The model named on the command line, its vocabulary large enough for text."""
    import jax.numpy as jnp

    from gptoss_jax.checkpoint import load

    model = load(options.checkpoint, mesh=mesh_of(options), dtype=jnp.dtype(options.dtype))
    if model.config.vocab_size < _NUM_HARMONY_IDS:
        raise CheckpointError(
            f"a vocabulary of {model.config.vocab_size}, harmony needs {_NUM_HARMONY_IDS}",
            where=str(options.checkpoint),
            fix="name a gpt-oss model; this one can only be used from Python, with ids",
        )
    return model


def _replace_what_cannot_be_written() -> None:
    """In a terminal of another encoding than the model's text, and for bytes on the input that are no text."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
