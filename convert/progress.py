"""Bytes done and their rate on a stream: one rewriting line on a terminal, a plain line now and then elsewhere."""

import time
from typing import Protocol, runtime_checkable

_TERMINAL_SECONDS = 0.1
_PLAIN_SECONDS = 10.0


def format_bytes(num_bytes: int | float) -> str:
    """In the largest decimal unit that leaves a whole part."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


@runtime_checkable
class Stream(Protocol):
    """What is written to: sys.stderr, or anything that does as much."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...


class Progress:
    """Counts bytes towards `total`, as a context; shows nothing without a stream."""

    def __init__(self, verb: str, total: int, stream: Stream | None) -> None:
        self.verb = verb
        self.total = total
        self.done = 0
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._started = self._shown = time.monotonic()
        self._resumed = 0
        self._is_line_open = False

    def skip(self, num_bytes: int) -> None:
        """Count bytes that were done before, outside the rate."""
        self.done += num_bytes
        self._resumed += num_bytes

    def add(self, num_bytes: int) -> None:
        """Count bytes done now."""
        self.done += num_bytes
        pause = _TERMINAL_SECONDS if self._is_terminal else _PLAIN_SECONDS
        if time.monotonic() - self._shown >= pause:
            self._show("" if self._is_terminal else "\n")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Show the last figures; after an error only end the line, so that its message starts one."""
        if error is None:
            self._show("\n")
        elif self._stream is not None and self._is_line_open:
            self._stream.write("\n")
            self._stream.flush()

    def _show(self, end: str) -> None:
        if self._stream is None:
            return
        self._shown = time.monotonic()
        rate = (self.done - self._resumed) / max(self._shown - self._started, 1e-9)
        share = self.done / max(self.total, 1)
        line = (
            f"{self.verb} {format_bytes(self.done)} of {format_bytes(self.total)} ({share:.0%}), {format_bytes(rate)}/s"
        )
        if self._is_terminal:
            line = f"\r{line:<70}"
        self._stream.write(line + end)
        self._is_line_open = not end
        self._stream.flush()
