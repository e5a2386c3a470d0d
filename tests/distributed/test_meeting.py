import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from gptoss_jax.distributed.launcher import Place
from gptoss_jax.distributed.meeting import come, receive_all, welcome
from gptoss_jax.errors import DistributedError
from tests.distributed.processes import free_port

SECONDS = 20.0  # never waited for where all goes well


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """The result of each, or what it raised."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except DistributedError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def receive(port: int, timeout_s: float = SECONDS) -> list[int]:
    """Process 0 of three: the ids of those that came."""
    met = receive_all(Place("localhost", port, 3, 0), timeout_s)
    welcome(met, service_port=7)
    for line, _ in met.values():
        line.close()
    return sorted(met)


def join(port: int, process_id: int, num_processes: int = 3, timeout_s: float = SECONDS) -> dict[str, Any]:
    """Another process: what it is answered."""
    line, answer = come(Place("localhost", port, num_processes, process_id), timeout_s)
    line.close()
    return dict(answer)


def meet(port: int, *others: tuple[int, int], timeout_s: float = SECONDS) -> list[Any]:
    """What process 0 of three gets, then those of these ids, each told of so many processes."""
    joining = (lambda other=other: join(port, *other, timeout_s) for other in others)
    return in_threads(lambda: receive(port, timeout_s), *joining)


def test_all_come_in_any_order() -> None:
    met, *answers = meet(free_port(), (2, 3), (1, 3))
    assert met == [1, 2]
    assert [answer["service_port"] for answer in answers] == [7, 7]


def test_missing_process_is_named_to_those_that_have_come() -> None:
    began = time.monotonic()
    errors = [str(result) for result in meet(free_port(), (2, 3), timeout_s=0.5)]
    assert time.monotonic() - began < 5
    assert errors[0] == errors[1]
    assert errors[0].startswith("process 1 of 3 did not come within 0.5 s: localhost:")


def test_id_given_twice_is_named_to_all() -> None:
    errors = {str(result) for result in meet(free_port(), (1, 3), (1, 3))}
    assert len(errors) == 1
    assert errors.pop().startswith("two processes have the id 1: localhost:")


def test_other_number_of_processes_is_named_to_both() -> None:
    errors = {str(result) for result in meet(free_port(), (1, 4))}
    assert len(errors) == 1
    assert errors.pop().startswith("process 1 knows of 4 processes, process 0 of 3: localhost:")


def test_strangers_are_sent_away() -> None:
    port = free_port()

    def stranger(text: bytes) -> bytes:
        for _ in range(100):
            try:
                with socket.create_connection(("localhost", port), timeout=SECONDS) as connection:
                    connection.sendall(text)
                    return connection.recv(100)
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise AssertionError("nobody listens")

    def after_the_strangers() -> Any:
        assert stranger(b"GET / HTTP/1.1\r\n\r\n") == b""
        assert stranger(json.dumps({"greeting": "gptoss-jax"}).encode() + b"\n") == b""
        return in_threads(lambda: join(port, 1), lambda: join(port, 2))

    met, _ = in_threads(lambda: receive(port), after_the_strangers)
    assert met == [1, 2]


def test_port_that_is_taken_is_named() -> None:
    message = r"cannot wait for the others \(Address already in use\): port \d+: choose another port"
    with socket.create_server(("localhost", 0)) as taken, pytest.raises(DistributedError, match=message):
        receive(taken.getsockname()[1])


def test_program_of_another_kind_in_process_0s_place_is_named() -> None:
    with socket.create_server(("localhost", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        with pytest.raises(DistributedError, match="process 0 does not answer"):
            join(other.getsockname()[1], 1, timeout_s=0.1)


def test_host_that_does_not_exist_is_named() -> None:
    with pytest.raises(
        DistributedError, match=r"process 0 does not answer \(.*; waited 0\.1 s\): nowhere\.invalid:1: "
    ):
        come(Place("nowhere.invalid", 1, 2, 1), 0.1)
