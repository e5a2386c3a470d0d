"""The processes of a run once they have met: what one tells the others, and what happens when one ends."""

import collections
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from gptoss_jax.distributed.lines import Line
from gptoss_jax.errors import DistributedError

_ENDED = 2
_GRACE_SECONDS = 3.0
"""What the rest of the program gets to fail by itself, with an error of its own, once another process has ended."""


class Team:
    """This process and its lines: process 0 has one to each other process, they have one to process 0."""

    def __init__(self, process_id: int, num_processes: int, lines: Mapping[int, Line]) -> None:
        self.process_id = process_id
        self.num_processes = num_processes
        self.loss: DistributedError | None = None
        """Why the run cannot go on, once another process has ended."""
        self.failed = False
        """Whether this process has told the others that it fails."""
        self._lines = dict(lines)
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._given: dict[str, dict[int, Any]] = {}
        self._names: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)  # threads take turns at one
        self._changed = threading.Condition()
        self._watching = False
        self._forced = False  # whether the loss is more than a process that was done
        for peer, line in self._lines.items():
            threading.Thread(target=self._listen, args=(peer, line), daemon=True).start()

    def tell(self, value: Any) -> Any:
        """What process 0 passes, on all processes; the others wait for it, and their own value does not count."""
        if self.process_id == 0:
            self._send(kind="told", value=value)
            return value
        message = self._told.get()
        if isinstance(message, DistributedError):
            self._told.put(message)
            raise message
        return message

    def exchange(self, name: str, value: Any) -> list[Any]:
        """What each process passes under this name, by process id."""
        with self._names[name]:
            if self.process_id:
                self._send(kind="given", name=name, value=value)
                return self._await(name, 1)[0]
            others = self._await(name, self.num_processes - 1)
            values = [value, *(others[peer] for peer in sorted(others))]
            self._send(kind="given", name=name, value=values)
            return values

    def watch(self) -> None:
        """From now on end this process soon after another has ended.

        By force, if it does not end by itself: a thread that waits for another process' part of a result cannot be
        woken. Raises DistributedError if one has ended already.
        """
        self._watching = True
        if self.loss is not None:
            raise self.loss

    def lost(self, timeout_s: float) -> DistributedError | None:
        """Why the run cannot go on, as soon as that is known."""
        with self._changed:
            self._changed.wait_for(lambda: self.loss is not None, timeout_s)
        return self.loss

    def leave(self, failure: str | None = None) -> None:
        """Tell the others that this process ends, so that they do not take it for lost; or what it failed of."""
        self._watching, self.failed = False, self.failed or failure is not None
        self._send(kind="leaves", failure=failure)

    def _send(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(message)

    def _await(self, name: str, count: int) -> dict[int, Any]:
        with self._changed:
            self._changed.wait_for(lambda: self.loss is not None or len(self._given.get(name, ())) == count)
            if len(self._given.get(name, ())) == count:
                return self._given.pop(name)
            assert self.loss is not None
            raise self.loss

    def _listen(self, peer: int, line: Line) -> None:
        while (message := line.receive()) is not None:
            match message:
                case {"kind": "told", "value": value}:
                    self._told.put(value)
                case {"kind": "given", "name": name, "value": value}:
                    with self._changed:
                        self._given.setdefault(name, {})[peer] = value
                        self._changed.notify_all()
                case {"kind": "lost", "peer": lost, "reason": reason, "force": force}:
                    self._lose(lost, reason, force=force)
                case {"kind": "leaves", "failure": failure}:
                    self._lose(peer, failure or "it was done", force=failure is not None)
                    return
        self._lose(peer, "its connection closed")

    def _lose(self, peer: int, reason: str, *, force: bool = True) -> None:
        loss = DistributedError(
            f"process {peer} ended ({reason})",
            where=f"process {self.process_id} of {self.num_processes}",
            fix="see what it printed, and start all of them again",
        )
        with self._changed:
            if self.loss is not None and (self._forced or not force):
                return
            self.loss, self._forced = loss, force
            self._changed.notify_all()
        self._told.put(loss)
        if self.process_id == 0:  # the others have no line to each other
            self._send(kind="lost", peer=peer, reason=reason, force=force)
        if force and self._watching:
            time.sleep(_GRACE_SECONDS)
            if self._watching:
                sys.stderr.write(f"gptoss-jax: {loss}\n")
                sys.stderr.flush()
                os._exit(_ENDED)
