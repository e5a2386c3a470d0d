"""More than one process: how they start together, what one tells the others, and how they end (docs/multi-process.md).

Around `jax.distributed`, which does not name who is missing, compares no arguments, and aborts with a stack trace when
a process is lost. Alone, a process tells itself.
"""

import atexit
import importlib.metadata
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gptoss_jax.distributed.launcher import Place, find
from gptoss_jax.distributed.lines import hold_open
from gptoss_jax.distributed.meeting import come, is_local, listen, receive_all, welcome
from gptoss_jax.distributed.team import Team
from gptoss_jax.errors import DistributedError

__all__ = ["exchange", "fail", "initialize", "is_first", "loss", "num_processes", "process_id", "tell"]

_VERSIONS = ("gptoss-jax", "jax", "jaxlib")
_NO_PROXY = "no_grpc_proxy"
_START_SECONDS = 600
_SHUTDOWN_SECONDS = 60

_team: Team | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    arguments: Mapping[str, object] | None = None,
    timeout_s: float = 60.0,
) -> None:
    """Join the other processes of this run, each of which calls this before anything that starts JAX.

    `coordinator` is HOST:PORT of process 0, where it waits for the others. Without any of the three, they are what
    Slurm, Open MPI, Kubernetes or a TPU pod says; a process that none of these started stays alone, and so does one
    told `num_processes=1`. `arguments` are compared: what must be equal in all processes.

    From then on a process that ends before the others ends them too, within seconds if it crashes or fails, within
    half a minute if its host is silent. Raises DistributedError if the others do not come within `timeout_s`, or were
    started with other arguments or versions, in all processes that have met.

    Example:
        >>> initialize("node0:1234", num_processes=2, process_id=1)  # doctest: +SKIP
    """
    global _team
    if _team is not None:
        raise DistributedError("initialized already", where="gptoss_jax.distributed", fix="call initialize once")
    place = find(coordinator, num_processes, process_id)
    if place is None:
        return
    if place.process_id == 0:
        met = receive_all(place, timeout_s)
        with listen(place, 0) as free:
            port = free.getsockname()[1]
        hosts = [socket.gethostname(), *(met[peer][1] for peer in sorted(met))]
        welcome(met, service_port=port, hosts=hosts)
        team = Team(0, place.num_processes, {peer: line for peer, (line, _) in met.items()})
        service = f"127.0.0.1:{port}"
    else:
        line, answer = come(place, timeout_s)
        hosts = answer["hosts"]
        team = Team(place.process_id, place.num_processes, {0: line})
        service = f"127.0.0.1:{hold_open(place.host, answer['service_port'])}"
    _check_equal(team, dict(arguments or {}))
    team.watch()
    _team = team
    atexit.register(_leave_at_exit)
    _reach_this_machine_directly()
    try:
        jax.distributed.initialize(
            service,
            place.num_processes,
            place.process_id,
            local_device_ids=_local_devices(place, hosts),
            cluster_detection_method="deactivate",
            initialization_timeout=_START_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            coordinator_bind_address=service if is_local(place) else service.replace("127.0.0.1", "[::]"),
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        fail(reason)
        raise DistributedError(
            f"JAX cannot start with others ({reason})",
            where="jax.distributed.initialize",
            fix="call gptoss_jax.distributed.initialize before anything else that uses JAX",
        ) from error


def process_id() -> int:
    """Which process this is; 0 where it is alone."""
    return 0 if _team is None else _team.process_id


def num_processes() -> int:
    """How many processes run together."""
    return 1 if _team is None else _team.num_processes


def is_first() -> bool:
    """Whether this is process 0: the one that reads the input and writes the output."""
    return process_id() == 0


def tell(value: Any) -> Any:
    """What process 0 passes, on all processes; the others wait for it, and their own value does not count.

    To be called by all in the same order. The value is one that JSON holds. Raises DistributedError on a process that
    waits for one that has ended.

    Example:
        >>> tell(7)  # alone
        7
    """
    return value if _team is None else _team.tell(value)


def exchange(name: str, value: Any) -> list[Any]:
    """What every process passes under `name`, by process id; all wait for all, in any order of names.

    The value is one that JSON holds. Raises DistributedError if a process ends before it has passed its own.

    Example:
        >>> exchange("free bytes", 123)  # alone
        [123]
    """
    return [value] if _team is None else _team.exchange(name, value)


def loss(timeout_s: float = 0.0) -> DistributedError | None:
    """Why the run cannot go on, if another process has ended, or does within `timeout_s`."""
    return None if _team is None else _team.lost(timeout_s)


def fail(reason: str) -> None:
    """Tell the others that this process ends before its time, and why; that ends them too."""
    if _team is not None:
        _team.leave(reason)


def _leave_at_exit() -> None:
    assert _team is not None
    error = getattr(sys, "last_exc", None)  # what ends a script
    if error is not None:
        fail(f"{type(error).__name__}: {error}")
    if _team.failed:
        sys.stdout.flush()
        os._exit(1)  # JAX would wait for the others, which wait for this one
    _team.leave()


def _check_equal(team: Team, arguments: Mapping[str, object]) -> None:
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    own = {name: str(value) for name, value in {**versions, **arguments}.items()}
    first, *others = team.exchange("arguments", own)
    for index, other in enumerate(others, 1):
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise DistributedError(
                    f"{name} is {first.get(name)} in process 0, {other.get(name)} in process {index}",
                    where="the processes' arguments",
                    fix="start the same command everywhere; only process ids may differ",
                )


def _reach_this_machine_directly() -> None:
    """Keep gRPC from asking a proxy for 127.0.0.1, where it would wait for ever; JAX then need not warn of proxies."""
    exempt = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy")
    os.environ[_NO_PROXY] = f"{exempt},127.0.0.1" if exempt else "127.0.0.1"
    jax.config.update("jax_check_proxy_envs", False)


def _local_devices(place: Place, hosts: Sequence[str]) -> list[int] | None:
    """The GPU of this process where a launcher has started several on its host, as JAX divides them; else all."""
    if place.local_id is None or hosts.count(hosts[place.process_id]) == 1 or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    if "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):  # the launcher has given each its own
        return None
    return [place.local_id]
