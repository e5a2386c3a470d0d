"""Starting the same program as several processes of this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240  # of a machine that does much else


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return listener.getsockname()[1]


def start(
    *arguments: object, num_devices: int = 1, stdin: int | IO[str] = subprocess.DEVNULL, **variables: str
) -> subprocess.Popen[str]:
    """Python with these arguments, from the repository's root, on some CPU devices of its own."""
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    environment = os.environ | devices | variables
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def place(port: int, process_id: int, num_processes: int = 2) -> list[str]:
    """The flags of one process."""
    flags = {"coordinator": f"localhost:{port}", "num-processes": num_processes, "process-id": process_id}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, once all have ended; none is left behind."""
    try:
        ended = [process.communicate(timeout=TIMEOUT_SECONDS) for process in processes]
        return [(process.returncode, *streams) for process, streams in zip(processes, ended, strict=True)]
    finally:
        for process in processes:
            process.kill()
