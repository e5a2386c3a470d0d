"""The record of an unfinished conversion: which source it reads, and which parameters are done.

One JSON line for the source, then one for each parameter, written after its last chunk. A line cut short by a crash is
a parameter not done.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.source import Source
from gptoss_jax.errors import ConversionError

_NAME = "journal.jsonl"


class Journal:
    """Open journal of the conversion in `directory`; `done` maps finished parameters to their checksums."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], done: dict[str, str]) -> None:
        self.path = directory / _NAME
        self.done = dict(done)
        # Written anew, so that a line cut short does not swallow the next one.
        self._write("w", identity)
        for path, checksum in self.done.items():
            self._write("a", {"path": path, "sha256": checksum})

    def add(self, path: str, checksum: str) -> None:
        """Record a parameter as written."""
        self.done[path] = checksum
        self._write("a", {"path": path, "sha256": checksum})

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether a conversion, complete or not, left its journal there."""
        return (directory / _NAME).is_file()

    @staticmethod
    def remove_from(directory: Path) -> None:
        """Delete the journal of a conversion that is complete."""
        (directory / _NAME).unlink()

    def _write(self, mode: str, entry: Mapping[str, Any]) -> None:
        with self.path.open(mode) as file:
            file.write(json.dumps(entry) + "\n")


def identify(source: Source, *, quantize: bool) -> dict[str, Any]:
    """What must be the same for a conversion to be continued: the files, untouched since, and the treatment."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.folder.files]
    return {
        "files": [list(file) for file in files],
        "layout": source.layout,
        "config": source.config.to_json(),
        "quantize": quantize,
    }


def read_done(directory: Path, identity: Mapping[str, Any]) -> dict[str, str]:
    """The parameters an interrupted conversion of the same source finished, with their checksums."""
    path = directory / _NAME
    lines = path.read_text().splitlines() if path.is_file() else []
    entries = [entry for entry in map(_parse, lines) if entry is not None]
    if not entries or entries[0] != identity:
        raise ConversionError(
            "the interrupted conversion had another source or other options",
            where=str(directory),
            fix="start again with --overwrite",
        )
    return {entry["path"]: entry["sha256"] for entry in entries[1:]}


def _parse(line: str) -> dict[str, Any] | None:
    """A line, or None where the crash cut it."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
