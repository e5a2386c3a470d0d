"""Fine-tuning in two real processes: the updates of one, checkpoints that one can take up, and who writes."""

import json
from pathlib import Path

import pytest

from gptoss_jax.cli import main
from tests.distributed.processes import finish, free_port, place, start

OPTIONS = ("--rank", 2, "--steps", 2, "--batch-size", 2, "--sequence-length", 96, "--dtype", "float32", "--json")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}], "date": "2025-08-05"}
        for word in ("one", "two", "three", "four")
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "expert=2"])
def test_two_processes_take_the_updates_of_one(
    demo_checkpoint: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mesh: str
) -> None:
    port = free_port()
    command = ("finetune", demo_checkpoint, chats, tmp_path / "two", *OPTIONS, "--mesh", mesh)
    first, second = finish([start("-m", "gptoss_jax.cli", *command, *place(port, index)) for index in range(2)])
    assert (first[0], second[0]) == (0, 0), (first[2], second[2])
    assert second[1] == ""
    alone = ("finetune", demo_checkpoint, chats, tmp_path / "one", *OPTIONS)
    assert main(list(map(str, alone))) == 0
    found, expected = (
        [json.loads(line)["loss"] for line in text.splitlines()] for text in (first[1], capsys.readouterr().out)
    )
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(found) == 2
    assert sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir()) == ["2"]
