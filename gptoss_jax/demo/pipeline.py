"""The whole pipeline on a small checkpoint made on the spot: publish, convert, verify, restore, chat.

The weights are random (a trained model will replace them), so the pipeline is real and the text is noise.
"""

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
from gptoss_jax.errors import ConversionError
from gptoss_jax.generation.sampling import Sampling
from gptoss_jax.harmony.vocabulary import cache_folder
from gptoss_jax.manifest import CONFIG, is_converted, partial_directory
from gptoss_jax.parameters import num_parameters

QUESTION = "What is 2 + 2?"
MAX_NEW_TOKENS = 24
PUBLISHED = "published"
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
    """Make the demo checkpoint afresh, chat one turn with it, and say on `output` what was done and how long it took.

    Returns the converted directory, which stays. Raises ConversionError for a directory that holds anything else.
    """
    directory = _checked(directory)
    published, converted = directory / PUBLISHED, directory / CONVERTED
    table = _Table(output)
    table.line(f"gpt-oss in small: {num_parameters(_config()):,} parameters, random weights, the published layout\n")
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
    program, path = _program(), shlex.quote(str(converted))
    for command in ("inspect", "verify", "chat"):
        table.line(f"  {program} {command} {path}")
    table.line(f"  {program} generate {path} --prompt 'Hello' --max-new-tokens {MAX_NEW_TOKENS} --json")
    return converted


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
    return MODELS["tiny"]()


def _checked(directory: Path | None) -> Path:
    """The directory, or the default one, if nothing but an earlier demo is in it."""
    directory = cache_folder() / "demo" if directory is None else directory
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
