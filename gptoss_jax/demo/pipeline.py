"""The whole pipeline on the demo model: publish, convert, verify, restore, chat."""

import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.converter import convert
from convert.progress import format_bytes
from convert.verify import verify
from gptoss_jax.chat import Chat
from gptoss_jax.chat_terminal import Printer, Screen
from gptoss_jax.checkpoint import load
from gptoss_jax.config import ModelConfig
from gptoss_jax.demo.compact import Compact
from gptoss_jax.demo.expand import PUBLISHED, SHIPPED, expand, home
from gptoss_jax.demo.tool_turns import TOOLS
from gptoss_jax.errors import ConversionError
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.harmony.conversation import Tool
from gptoss_jax.manifest import CONFIG, is_converted, partial_directory
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.parameters import num_parameters

QUESTIONS = {"low": "What is 39 + 54?", "medium": "What is 95 - 38?", "high": "Sort 52, 7, 31."}
"""By reasoning level; sums that the corpus does not have (`turns.held_out`)."""
TOOL_QUESTION = "What is the weather in Paris tomorrow?"
WEATHER = dataclasses.replace(TOOLS["get_weather"], function=lambda city, day: {"degrees": 21, "sky": "sun"})
"""Wherever and whenever."""
_MOST_TOKENS = 256
_PLAINLY = """
This is a tiny model for trying the software, not gpt-oss: it knows what its corpus has (docs/demo.md), which is sums,
lists, some facts and three tools. The checkpoint stays; go on with it:
"""
CONVERTED = "converted"
_UNFINISHED = f".{PUBLISHED}."
"""What `expand` leaves where it is killed begins so."""


def make_checkpoint(directory: Path | None = None) -> Path:
    """The converted demo checkpoint in `directory` (the user's cache folder by default), made if it is not there.

    212 MB, beside as many of the published one it is made of, in a few seconds. Raises ConversionError for a directory
    that holds anything else or cannot be written.

    Example:
        >>> model = load(make_checkpoint())  # doctest: +SKIP
    """
    directory = _checked(directory, Compact.open(SHIPPED))
    converted = directory / CONVERTED
    if not is_converted(converted):
        convert(expand(directory / PUBLISHED, SHIPPED), converted, overwrite=True)
    return converted


def run(directory: Path | None = None, *, output: Screen) -> Path:
    """Convert the demo checkpoint, chat with it, and say on `output` what was done and how long it took.

    Returns the converted directory, which stays. Raises ConversionError as `make_checkpoint` does.
    """
    compact = Compact.open(SHIPPED)
    directory = _checked(directory, compact)
    published, converted = directory / PUBLISHED, directory / CONVERTED
    table = _Table(output)
    table.line(f"gpt-oss in small: {num_parameters(compact.config):,} parameters, trained, the published layout\n")
    with table.row("publish") as result:
        expand(published, SHIPPED)
        result.append(f"{format_bytes(_size(published))} of safetensors, from {format_bytes(SHIPPED.stat().st_size)}")
    with table.row("convert") as result:
        manifest = convert(published, converted, overwrite=True)
        result.append(f"{len(manifest.sha256)} parameters to Orbax, {format_bytes(_size(converted))}")
    with table.row("verify") as result:
        result.append(f"{format_bytes(verify(converted, published).num_bytes)} equal bit for bit")
    with table.row("restore") as result:
        model = load(converted)
        result.append(f"{model.dtype} on {model.mesh.size} {model.mesh.devices.flat[0].platform} device, experts MXFP4")
    _ask(model, table, output)
    program, path = _program(), shlex.quote(str(converted))
    for command in ("inspect", "verify", "chat"):
        table.line(f"  {program} {command} {path}")
    table.line(f"  {program} generate {path} --prompt 'What is 39 + 54?' --reasoning high")
    return converted


def _ask(model: Transformer, table: "_Table", output: Screen) -> None:
    """A question at each reasoning level, and one that needs a tool, greedily."""

    def chat(level: str, *tools: Tool) -> Chat:
        return Chat(
            model, reasoning=level, tools=tools, sampling=Sampling(temperature=0.0), max_new_tokens=_MOST_TOKENS
        )

    asked = [(level, question, chat(level)) for level, question in QUESTIONS.items()]
    for level, question, talk in [*asked, ("low", TOOL_QUESTION, chat("low", WEATHER))]:
        table.line(f"\n> {question}   (reasoning {level}{', with a tool' if talk.tools else ''})")
        Printer(output).answer(talk.send(question))
    table.line(_PLAINLY)


class _Table:
    """Rows of step, result and seconds, each written when its step is over."""

    def __init__(self, output: Screen) -> None:
        self._output = output

    def line(self, text: str) -> None:
        self._output.write(text + "\n")
        self._output.flush()

    @contextmanager
    def row(self, step: str) -> Iterator[list[str]]:
        """Time the block; it appends its result to the list."""
        began = time.perf_counter()
        result: list[str] = []
        yield result
        self.line(f"  {step:<8}  {result[0]:<52}  {time.perf_counter() - began:6.2f} s")


def _program() -> str:
    """How to call the command line from here: by its path where the environment it is in is not active."""
    name = "gptoss-jax"
    return name if shutil.which(name) else shlex.quote(str(Path(sys.executable).with_name(name)))


def _checked(directory: Path | None, compact: Compact) -> Path:
    """The directory, or the default one, if nothing but an earlier demo is in it."""
    directory = directory or home(compact)
    if not directory.exists():
        return directory
    ours = {PUBLISHED, CONVERTED, partial_directory(Path(CONVERTED)).name}
    configs = [path for path in (directory / PUBLISHED / CONFIG, directory / CONVERTED / CONFIG) if path.exists()]
    if (
        not directory.is_dir()
        or not all(path.name in ours or path.name.startswith(_UNFINISHED) for path in directory.iterdir())
        or any(ModelConfig.read(path) != compact.config for path in configs)
    ):
        raise ConversionError(
            "holds something other than an earlier demo", where=str(directory), fix="name a new or an empty directory"
        )
    return directory


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
