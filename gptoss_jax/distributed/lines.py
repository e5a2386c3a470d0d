"""A line to another process: JSON messages over TCP, and word at once when the other end is gone."""

import contextlib
import json
import socket
import threading
from typing import Any

_MOST_BYTES = 1 << 26
_SILENCE_SECONDS = 30
"""How long a host may not answer: one that loses its power, unlike a process that ends, closes no connection."""
_WATCH = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": (_SILENCE_SECONDS - 10) // 5,
    "TCP_USER_TIMEOUT": 1000 * _SILENCE_SECONDS,
}


class Line:
    """One connection, watched by the kernel; any thread may send, one receives.

    Example:
        >>> near, far = map(Line, socket.socketpair())
        >>> near.send({"kind": "hello"})
        >>> far.receive()
        {'kind': 'hello'}
        >>> near.close()
        >>> far.receive() is None
        True
        >>> far.close()
    """

    def __init__(self, connection: socket.socket) -> None:
        watch(connection)
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Send it, unless the other end is gone: whoever receives learns that."""
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next message; None once the other end is gone, or writes something else, or for `timeout_s` nothing."""
        try:
            self._connection.settimeout(timeout_s)
            message = json.loads(self._reader.readline(_MOST_BYTES))
            self._connection.settimeout(None)
        except (OSError, ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self._reader.close()
        self._connection.close()


def watch(connection: socket.socket) -> None:
    """Send small messages at once, and let the kernel close a connection whose other host is silent."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _WATCH.items():
        if (option := getattr(socket, name, None)) is not None:  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def hold_open(host: str, port: int) -> int:
    """Pass connections on to a host's port, and keep them open on this side when the other side is gone.

    Returns the local port to connect to. JAX aborts a process, with a stack trace that nothing can catch, the moment
    that the connection to its coordination service ends; behind this it waits, and the process can end by itself.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection((host, port))
            except OSError:
                near.close()
                continue
            watch(near)
            watch(far)
            threading.Thread(target=_pass_on, args=(near, far), kwargs={"close": True}, daemon=True).start()
            threading.Thread(target=_pass_on, args=(far, near), kwargs={"close": False}, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def _pass_on(source: socket.socket, target: socket.socket, *, close: bool) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    if close:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
