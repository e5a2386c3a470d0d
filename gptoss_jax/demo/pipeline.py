"""The whole pipeline on a small checkpoint: publish, convert, verify, restore, chat.

It is the trained demo model's where its weights are shipped (`expand.SHIPPED`). Otherwise the weights are random: the
pipeline is real and the text is noise.
"""

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
from convert.synthetic import MODELS, write_checkpoint
from convert.verify import verify
from gptoss_jax.chat import Chat
from gptoss_jax.chat_events import ChatEvent, Done, Text
from gptoss_jax.chat_terminal import Printer, Screen
from gptoss_jax.checkpoint import load
from gptoss_jax.config import ModelConfig
from gptoss_jax.demo.compact import Compact
from gptoss_jax.demo.expand import PUBLISHED, SHIPPED, expand, home
from gptoss_jax.demo.tool_turns import TOOLS
from gptoss_jax.errors import ConversionError
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.harmony.conversation import Tool
from gptoss_jax.harmony.vocabulary import cache_folder
from gptoss_jax.manifest import CONFIG, is_converted, partial_directory
from gptoss_jax.model.transformer import Transformer
from gptoss_jax.parameters import num_parameters

QUESTION = "What is 2 + 2?"
QUESTIONS = {"low": "What is 39 + 54?", "medium": "What is 95 - 38?", "high": "Sort 52, 7, 31."}
"""By reasoning level; sums that the corpus does not have (`turns.held_out`)."""
TOOL_QUESTION = "What is the weather in Paris tomorrow?"
WEATHER = dataclasses.replace(TOOLS["get_weather"], function=lambda city, day: {"degrees": 21, "sky": "sun"})
"""Wherever and whenever."""
MAX_NEW_TOKENS = 24
_MOST_TOKENS = 256
_PLAINLY = """
This is a tiny model for trying the software, not gpt-oss: it knows what its corpus has (docs/demo.md), which is sums,
lists, some facts and three tools. The checkpoint stays; go on with it:
"""
CONVERTED = "converted"
_SEED = 4
_NUM_SHARDS = 2


def make_checkpoint(directory: Path | None = None) -> Path:
    """The converted demo checkpoint in `directory` (the user's cache folder by default), made if it is not there.

    51 MB, made in a few seconds. Raises ConversionError for a directory that holds anything else.

    Example:
        >>> model = load(make_checkpoint())  # doctest: +SKIP
    """
    directory = _checked(directory)
    converted = directory / CONVERTED
    if not is_converted(converted):
        _publish(directory)
        convert(directory / PUBLISHED, converted, overwrite=True)
    return converted


def run(directory: Path | None = None, *, output: Screen) -> Path:
    """Make the demo checkpoint afresh, chat with it, and say on `output` what was done and how long it took.

    Returns the converted directory, which stays. Raises ConversionError for a directory that holds anything else.
    """
    directory = _checked(directory)
    published, converted = directory / PUBLISHED, directory / CONVERTED
    table = _Table(output)
    config, trained = _config(), SHIPPED.is_file()
    weights = "trained weights" if trained else "random weights"
    table.line(f"gpt-oss in small: {num_parameters(config):,} parameters, {weights}, the published layout\n")
    with table.row("publish") as result:
        num_files, num_bytes = _publish(directory)
        result.append(f"{num_files} safetensors files, {format_bytes(num_bytes)}")
    with table.row("convert") as result:
        manifest = convert(published, converted, overwrite=True)
        result.append(f"{len(manifest.sha256)} parameters to Orbax, {format_bytes(_size(converted))}")
    with table.row("verify") as result:
        result.append(f"{format_bytes(verify(converted, published).num_bytes)} equal bit for bit")
    with table.row("restore") as result:
        model = load(converted)
        result.append(f"{model.dtype} on {model.mesh.size} {model.mesh.devices.flat[0].platform} device, experts MXFP4")
    (_ask if trained else _chat)(model, table, output)
    program, path = _program(), shlex.quote(str(converted))
    for command in ("inspect", "verify", "chat"):
        table.line(f"  {program} {command} {path}")
    table.line(f"  {program} generate {path} --prompt 'Hello' --max-new-tokens {MAX_NEW_TOKENS} --json")
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


def _chat(model: Transformer, table: "_Table", output: Screen) -> None:
    """The same turn twice, of random weights."""
    chat = Chat(model, reasoning="low", sampling=Sampling(temperature=0.0), max_new_tokens=MAX_NEW_TOKENS)
    with table.row("chat") as result:
        events = list(chat.send(QUESTION))
        result.append(f"{_counts(events)}, compilation included")
    chat.reset()
    with table.row("again") as result:
        result.append(f"{_counts(list(chat.send(QUESTION)))}, compiled")
    table.line(f"\n> {QUESTION}")
    Printer(output).answer(event for event in events if isinstance(event, Text))
    table.line("\nThe weights are random, so the text is noise. The checkpoint stays; go on with it:\n")


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


def _config() -> ModelConfig:
    return Compact.open(SHIPPED).config if SHIPPED.is_file() else MODELS["tiny"]()


def _checked(directory: Path | None) -> Path:
    """The directory, or the default one, if nothing but an earlier demo is in it."""
    if directory is None:
        directory = home(Compact.open(SHIPPED)) if SHIPPED.is_file() else cache_folder() / "demo"
    if not directory.exists():
        return directory
    ours = {PUBLISHED, CONVERTED, partial_directory(Path(CONVERTED)).name}
    configs = [path for path in (directory / PUBLISHED / CONFIG, directory / CONVERTED / CONFIG) if path.exists()]
    if (
        not directory.is_dir()
        or not {path.name for path in directory.iterdir()} <= ours
        or any(ModelConfig.read(path) != _config() for path in configs)
    ):
        raise ConversionError(
            "holds something other than an earlier demo", where=str(directory), fix="name a new or an empty directory"
        )
    return directory


def _publish(directory: Path) -> tuple[int, int]:
    """Write the checkpoint as OpenAI would publish it; returns the number of its files and their bytes."""
    published = directory / PUBLISHED
    try:
        if SHIPPED.is_file():
            expand(published, SHIPPED)
        else:
            write_checkpoint(published, _config(), seed=_SEED, num_shards=_NUM_SHARDS)
    except OSError as error:
        raise ConversionError(
            f"cannot write ({error.strerror})", where=str(published), fix="name a directory with 110 MB free"
        ) from error
    return len(list(published.glob("*.safetensors"))), _size(published)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _counts(events: list[ChatEvent]) -> str:
    done = events[-1]
    assert isinstance(done, Done)
    return f"{done.prompt_tokens} tokens read, {done.completion_tokens} written"
