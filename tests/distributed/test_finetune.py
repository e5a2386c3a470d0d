"""Fine-tuning in two real processes: the updates of one, checkpoints that others can take up, and who writes."""

import json
import shutil
from pathlib import Path

import pytest

from gptoss_jax.cli import main
from tests.distributed.processes import finish, free_port, place, start

OPTIONS = ("--rank", 2, "--steps", 2, "--batch-size", 2, "--sequence-length", 96, "--dtype", "float32", "--json")
OPTIONS += ("--save-every", 1)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}], "date": "2025-08-05"}
        for word in ("one", "two", "three", "four")
    ]
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def finetune(*command: object) -> list[float]:
    """The losses that two processes tell, of which the first speaks for both."""
    port = free_port()
    first, second = finish(
        [start("-m", "gptoss_jax.cli", "finetune", *command, *OPTIONS, *place(port, index)) for index in range(2)]
    )
    assert (first[0], second[0]) == (0, 0), (first[2], second[2])
    assert second[1] == ""
    return losses(first[1])


def losses(text: str) -> list[float]:
    return [json.loads(line)["loss"] for line in text.splitlines()]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def run(random_checkpoint: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that share the rows."""
    directory = tmp_path_factory.mktemp("runs") / "two"
    finetune(random_checkpoint, chats, directory, "--mesh", "data=2")
    assert saved(directory) == ["1", "2"]
    return directory


@pytest.mark.slow
def test_two_processes_take_the_updates_of_one(
    run: Path, random_checkpoint: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", *map(str, (random_checkpoint, chats, tmp_path / "one", *OPTIONS))]) == 0
    alone = losses(capsys.readouterr().out)
    assert losses((run / "metrics.jsonl").read_text()) == pytest.approx(alone, rel=1e-4)
    assert len(alone) == 2


@pytest.mark.slow
def test_two_processes_go_on_where_others_stopped(
    run: Path, random_checkpoint: Path, chats: Path, tmp_path: Path
) -> None:
    """On another mesh, where they share the experts and the unembedding's rows, which each has in its host's memory."""
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "checkpoints" / "2")
    found = finetune(random_checkpoint, chats, stopped, "--mesh", "expert=2", "--resume", "--vocabulary-on-host")
    both = losses((run / "metrics.jsonl").read_text())
    assert found == pytest.approx(both[1:], rel=1e-4)
    assert losses((stopped / "metrics.jsonl").read_text()) == [both[0], *found]
    assert saved(stopped) == ["1", "2"]
