"""How the processes of a run find each other: all come to process 0, which waits for a bounded time."""

import errno
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from gptoss_jax.distributed.launcher import Place
from gptoss_jax.distributed.lines import Line
from gptoss_jax.errors import DistributedError

_GREETING = "gptoss-jax"
_HELLO_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_GRACE_SECONDS = 5.0
"""How much longer than process 0 the others wait, so that it can say who is missing."""


def receive_all(place: Place, timeout_s: float) -> dict[int, tuple[Line, str]]:
    """Process 0: the line to each other process and the name of its host, once all have come.

    Raises DistributedError, here and in those that have come, if some have not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    met: dict[int, tuple[Line, str]] = {}
    with listen(place, place.port) as listener:
        while len(met) < place.num_processes - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = ", ".join(str(index) for index in range(1, place.num_processes) if index not in met)
                what = f"process {missing} of {place.num_processes} did not come within {timeout_s:g} s"
                fix = "start them all, or one alone with --num-processes 1; see what they say"
                raise _refused(met, DistributedError(what, where=_where(place), fix=fix)) from None
            line = Line(connection)
            match line.receive(_HELLO_SECONDS):
                case {"greeting": "gptoss-jax", "process_id": process_id, "num_processes": num_processes, "host": host}:
                    pass
                case _:
                    line.close()  # somebody else's
                    continue
            what = None
            if num_processes != place.num_processes:
                what = f"process {process_id} knows of {num_processes} processes, process 0 of {place.num_processes}"
            elif process_id in met or process_id == 0:
                what = f"two processes have the id {process_id}"
            if what is not None:
                met[-1] = line, host  # is told too
                fix = "give all the same num-processes, and each its own process-id"
                raise _refused(met, DistributedError(what, where=_where(place), fix=fix))
            met[process_id] = line, host
    return met


def come(place: Place, timeout_s: float) -> tuple[Line, Mapping[str, Any]]:
    """Any other process: the line to process 0, and what it answered. Raises DistributedError as process 0 does."""
    deadline = time.monotonic() + timeout_s
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=min(left, _HELLO_SECONDS))
        except OSError as error:
            reason = error.strerror or str(error) or "no answer"
            time.sleep(_RETRY_SECONDS)
            continue
        line = Line(connection)
        line.send(
            {
                "greeting": _GREETING,
                "process_id": place.process_id,
                "num_processes": place.num_processes,
                "host": socket.gethostname(),
            }
        )
        answer = line.receive(left + _GRACE_SECONDS)
        if answer is not None and answer.get("greeting") == _GREETING:
            if "what" in answer:
                line.close()
                raise DistributedError(answer["what"], where=answer["where"], fix=answer["fix"])
            return line, answer
        line.close()
        reason = "what answers is no gptoss-jax that waits for others"
        time.sleep(_RETRY_SECONDS)
    raise DistributedError(
        f"process 0 does not answer ({reason}; waited {timeout_s:g} s)",
        where=_where(place),
        fix="start process 0 there, and see that this host can reach it",
    )


def welcome(met: Mapping[int, tuple[Line, str]], **answer: object) -> None:
    """Process 0: tell all that everybody has come."""
    for line, _ in met.values():
        line.send({"greeting": _GREETING, **answer})


def is_local(place: Place) -> bool:
    """Whether the others come from this very host."""
    return place.host in ("localhost", "127.0.0.1")


def listen(place: Place, port: int) -> socket.socket:
    """Process 0: listen to those who may come. Raises DistributedError for a port that it cannot have."""
    try:
        if is_local(place):
            return socket.create_server((place.host, port))
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise DistributedError(
            f"cannot wait for the others ({os.strerror(error.errno or 0)})",
            where=f"port {port}",
            fix="choose another port in --coordinator" if taken else "choose a port from 1024 on",
        ) from error


def _refused(met: Mapping[int, tuple[Line, str]], error: DistributedError) -> DistributedError:
    welcome(met, what=error.what, where=error.where, fix=error.fix)
    for line, _ in met.values():
        line.close()
    return error


def _where(place: Place) -> str:
    return f"{place.host}:{place.port}"
