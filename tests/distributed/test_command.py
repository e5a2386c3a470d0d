"""The command line in two real processes: who writes, and what each says when the other ends or disagrees."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gptoss_jax.cli import main
from tests.distributed.processes import finish, free_port, place, start


def command(port: int, process_id: int, *arguments: object, **options) -> subprocess.Popen[str]:
    return start("-m", "gptoss_jax.cli", *arguments, *place(port, process_id), **options)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process_ends_the_other_with_one_line(random_checkpoint: Path, killed: int) -> None:
    port = free_port()
    arguments = (
        "generate",
        random_checkpoint,
        "--raw",
        "--prompt",
        "Hi",
        "--max-new-tokens",
        100_000,
        "--mesh=expert=2",
    )
    processes = [command(port, process_id, *arguments) for process_id in range(2)]
    assert processes[0].stdout is not None
    assert processes[0].stdout.read(1), "it has begun to answer"
    processes[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    ended = finish(processes)
    assert time.monotonic() - began < 60
    assert ended[killed][0] == -signal.SIGKILL
    code, output, errors = ended[1 - killed]
    assert code == 2
    assert errors == (
        f"gptoss-jax: process {killed} ended (its connection closed): process {1 - killed} of 2: see what it printed, "
        "and start all of them again\n"
    )
    assert killed == 1 or output == ""


@pytest.mark.slow
def test_chat_reads_and_writes_in_process_0(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("Hello\n/reset\nAgain\n")
    port = free_port()
    arguments = ("chat", random_checkpoint, "--json", "--max-new-tokens", 4, "--mesh", "tensor=2")
    with (tmp_path / "lines").open() as lines:
        first, second = finish([command(port, 0, *arguments, stdin=lines), command(port, 1, *arguments)])
    assert second == (0, "", "")
    assert (first[0], first[2]) == (0, "")
    events = [json.loads(line) for line in first[1].splitlines()]
    assert [event["completion_tokens"] for event in events if event["type"] == "done"] == [4, 4]


def test_different_arguments_are_named_by_both(tmp_path: Path) -> None:
    port = free_port()
    arguments = ("generate", tmp_path, "--prompt", "hi")
    ended = finish(
        [command(port, 0, *arguments, "--temperature", 0.5), command(port, 1, *arguments, "--temperature", 0)]
    )
    line = (
        "gptoss-jax: temperature is 0.5 in process 0, 0.0 in process 1: the processes' arguments: start the same "
        "command everywhere; only process ids may differ\n"
    )
    assert ended == [(2, "", line), (2, "", line)]


def test_error_of_one_is_told_to_the_other(random_checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    arguments = ("--prompt", "hi", "--mesh", "expert=2")
    first, second = finish(
        [
            command(port, 0, "generate", random_checkpoint, *arguments),
            command(port, 1, "generate", tmp_path, *arguments),
        ]
    )
    assert second[:2] == first[:2] == (2, "")
    assert second[2].startswith(f"gptoss-jax: no manifest.json: {tmp_path}: name a directory")
    assert first[2].startswith(f"gptoss-jax: process 1 ended (no manifest.json: {tmp_path}: name a directory")
    assert first[2].count("\n") == second[2].count("\n") == 1


@pytest.mark.parametrize(
    ("process_id", "message"),
    [(0, "process 1 of 2 did not come within 0.2 s: localhost:"), (1, "process 0 does not answer (Connection refused")],
)
def test_waiting_ends(process_id: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "ckpt", "--prompt", "hi", *place(free_port(), process_id), "--wait", "0.2"]
    began = time.monotonic()
    assert main(arguments) == 2
    assert time.monotonic() - began < 10
    captured = capsys.readouterr()
    assert captured.err.startswith(f"gptoss-jax: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--process-id 1", "process-id without coordinator: processes: give coordinator, num-processes and process-id"),
        ("--coordinator a:1 --process-id 1", "coordinator without num-processes: "),
        ("--coordinator a:1 --num-processes 2", "coordinator without process-id: "),
        ("--coordinator a:1 --num-processes 0 --process-id 0", "0 processes: num-processes: give 1 or more"),
        ("--coordinator a:1 --num-processes 2 --process-id 2", "process 2 of 2: process-id: choose 0 to 1"),
        ("--coordinator a:1 --num-processes 2 --process-id=-1", "process -1 of 2: process-id: choose 0 to 1"),
        ("--coordinator a --num-processes 2 --process-id 0", "cannot read 'a': coordinator: write HOST:PORT"),
        ("--coordinator a:99999 --num-processes 2 --process-id 0", "cannot read 'a:99999': coordinator: "),
    ],
)
@pytest.mark.parametrize("name", ["generate ckpt --prompt hi", "chat ckpt", "verify ckpt --golden", "bench"])
def test_places_that_make_no_sense_are_one_line(
    name: str, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*name.split(), *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"gptoss-jax: {message}")
    assert captured.err.count("\n") == 1


SCRIPT = """
import sys, time
import jax
from gptoss_jax import distributed
process_id = int(sys.argv[2])
if process_id == 1 and "jax first" in sys.argv:
    jax.devices()
distributed.initialize(sys.argv[1], 2, process_id)
if process_id == 1:
    raise ValueError("no luck")
time.sleep(60)
"""


def test_script_that_started_jax_too_early_is_told_so() -> None:
    coordinator = f"localhost:{free_port()}"
    first, second = finish([start("-c", SCRIPT, coordinator, index, "jax first") for index in range(2)])
    assert (first[0], second[0]) == (2, 1)
    assert first[2].startswith("gptoss-jax: process 1 ended (jax.distributed.initialize() must be called before any")
    assert "DistributedError: JAX cannot start with others (jax.distributed.initialize() must be called" in second[2]


def test_script_that_raises_ends_the_other() -> None:
    coordinator = f"localhost:{free_port()}"
    nobody = {"http_proxy": "http://127.0.0.1:9", "grpc_proxy": "http://127.0.0.1:9"}  # is asked for this machine
    began = time.monotonic()
    first, second = finish([start("-c", SCRIPT, coordinator, index, **nobody) for index in range(2)])
    assert time.monotonic() - began < 60
    assert first == (
        2,
        "",
        "gptoss-jax: process 1 ended (ValueError: no luck): process 0 of 2: see what it printed, and start all of them "
        "again\n",
    )
    assert second[0] == 1
    assert second[2].endswith("\nValueError: no luck\n")


def test_alone_nothing_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "nowhere", "--prompt", "hi", "--num-processes", "1"]) == 2
    assert capsys.readouterr().err.startswith("gptoss-jax: no such directory: nowhere")
