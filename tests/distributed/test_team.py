import contextlib
import os
import queue
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gptoss_jax.distributed.lines import Line, hold_open
from gptoss_jax.distributed.team import Team
from gptoss_jax.errors import DistributedError
from tests.distributed.test_meeting import in_threads


@pytest.fixture
def connections() -> list[tuple[socket.socket, socket.socket]]:
    """Of process 0 with each of two others: its own end first."""
    return [socket.socketpair() for _ in range(2)]


@pytest.fixture
def teams(connections) -> Iterator[list[Team]]:
    """Three processes', by id."""
    near, far = ([Line(pair[end]) for pair in connections] for end in range(2))
    yield [Team(0, 3, dict(enumerate(near, 1))), *(Team(index, 3, {0: line}) for index, line in enumerate(far, 1))]
    for pair in connections:
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # whoever listens is done
    for line in (*near, *far):
        line.close()


def of_each(teams: list[Team], call: Callable[[Team], Any]) -> list[Any]:
    return in_threads(*(lambda team=team: call(team) for team in teams))


def test_what_process_0_tells_reaches_all_in_order(teams) -> None:
    told = of_each(teams, lambda team: [team.tell([team.process_id, turn]) for turn in range(3)])
    assert told == [[[0, 0], [0, 1], [0, 2]]] * 3


def test_exchange_gives_all_what_each_has(teams) -> None:
    assert of_each(teams, lambda team: team.exchange("id", team.process_id)) == [[0, 1, 2]] * 3


def test_exchanges_of_other_names_do_not_wait_for_each_other(teams) -> None:
    def both(team: Team) -> list[list[str]]:
        names = ["a", "b"] if team.process_id == 1 else ["b", "a"]
        return sorted(in_threads(*(lambda name=name: team.exchange(name, name) for name in names)))

    assert of_each(teams, both) == [[["a"] * 3, ["b"] * 3]] * 3


def test_lost_process_is_named_to_all_that_wait(teams, connections) -> None:
    first, second, _ = teams
    *errors, _ = in_threads(
        lambda: first.exchange("x", 0),
        lambda: second.exchange("x", 1),
        lambda: connections[1][1].shutdown(socket.SHUT_RDWR),
    )
    assert [str(error).partition(": see")[0] for error in errors] == [
        "process 2 ended (its connection closed): process 0 of 3",
        "process 2 ended (its connection closed): process 1 of 3",
    ]
    with pytest.raises(DistributedError, match="process 2 ended"):
        second.tell(None)
    assert first.lost(0.0) is errors[0]


def test_what_a_process_failed_of_is_told(teams) -> None:
    first, _, third = teams
    third.leave("no such directory")
    assert third.failed
    assert str(first.lost(20.0)).startswith("process 2 ended (no such directory): process 0 of 3: ")


def test_process_that_waits_for_one_that_is_done_is_told_so(teams) -> None:
    first, second, _ = teams
    first.leave()
    assert not first.failed
    with pytest.raises(DistributedError, match=r"process 0 ended \(it was done\)"):
        second.exchange("x", 1)


def test_process_that_is_lost_ends_the_others_and_one_that_is_done_does_not(monkeypatch, teams, connections) -> None:
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(os, "_exit", ends.put)
    monkeypatch.setattr("gptoss_jax.distributed.team._GRACE_SECONDS", 0.0)
    _, second, third = teams
    third.watch()
    second.leave()
    assert str(third.lost(20.0)).startswith("process 1 ended (it was done): process 2 of 3: ")
    connections[1][0].shutdown(socket.SHUT_RDWR)
    assert ends.get(timeout=20.0) == 2
    assert str(third.loss).startswith("process 0 ended (its connection closed): process 2 of 3: ")
    assert ends.empty()


def test_connection_is_held_open_when_the_other_side_is_gone() -> None:
    with socket.create_server(("localhost", 0)) as service:
        near = socket.create_connection(("127.0.0.1", hold_open("localhost", service.getsockname()[1])))
        far, _ = service.accept()
        near.sendall(b"there")
        assert far.recv(10) == b"there"
        far.sendall(b"back")
        assert near.recv(10) == b"back"
        far.close()
        near.settimeout(0.2)
        with pytest.raises(TimeoutError):
            near.recv(10)
        near.close()
