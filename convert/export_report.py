"""What an export has written, and how far rounding moved the trained weights: as lines and as JSON."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from convert.table import table
from gptoss_jax.manifest import SourceFile

TOKENIZER_FILES = "tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja"
MUCH = 0.5
"""The error over the change from which on the report says so."""
_COLUMNS = ("attention", "router", "experts.gate_up", "experts.down")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the written values of one weight are from its exact float32 values, in Frobenius norms."""

    path: str
    norm: float
    """Of the exact values."""
    error: float
    """Of what rounding them changed."""
    change: float | None
    """Of what training changed; None where the run holds whole weights, not their change."""

    @property
    def relative_error(self) -> float:
        """The error over the norm."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def error_of_change(self) -> float | None:
        """The error over the change: from 1 on, rounding moved the weight as far as training did."""
        return self.error / self.change if self.change else None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"path": self.path, "relative_error": self.relative_error, "error_of_change": self.error_of_change}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export` wrote; `str` of it is what the command prints."""

    source: str
    destination: str
    exporter: str
    """Name and version of the program."""
    form: str
    """hf, original or peft."""
    dtype: str
    """Of the experts' matrices: mxfp4 or bf16; float32 in a PEFT adapter."""
    method: str | None
    """How the run was trained: lora, full or qat; None for a converted checkpoint."""
    step: int | None
    num_tensors: int
    num_bytes: int
    files: tuple[SourceFile, ...]
    """The safetensors files."""
    differences: tuple[Difference, ...]
    """Of every weight that was trained; none in a PEFT adapter, which is written as it is."""

    def to_json(self) -> dict[str, Any]:
        """For programs, and for export.json."""
        return dataclasses.asdict(self) | {"differences": [difference.to_json() for difference in self.differences]}

    def __str__(self) -> str:
        trained = "" if self.method is None else f", {self.method} step {self.step}"
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        form = "PEFT adapter" if self.form == "peft" else f"{self.form} layout"
        lines = [
            f"{self.destination}: {self.num_tensors} tensors, {self.num_bytes:,} bytes in {files}, "
            f"{form}, {self.dtype}{trained}"
        ]
        if self.differences:
            lines += ["", *self._table(), ""]
        if lost := [d for d in self.differences if (d.error_of_change or 0.0) >= MUCH]:
            lines.append(
                f"rounding moves {len(lost)} of {len(self.differences)} weights at least {MUCH:g} times as far as "
                "training did: --dtype bf16 rounds less, --peft not at all"
            )
        if self.form == "hf":
            lines.append(f"tokenizer: copy {TOKENIZER_FILES} from the published repository")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """A row for each layer: the relative errors of its weights, and in brackets the error over the change."""
        cells: dict[str, dict[str, list[Difference]]] = {}
        for difference in self.differences:
            layer, column = _place(difference.path)
            if column is not None:
                cells.setdefault(layer, {}).setdefault(column, []).append(difference)
        columns = [column for column in _COLUMNS if any(column in row for row in cells.values())]
        rows = [[layer, *(_cell(row.get(column, [])) for column in columns)] for layer, row in cells.items()]
        return [
            "  relative error of what is written, against exact sums in float32 (and over the size of the change):",
            *table(["layer", *columns], rows),
        ]


def _place(path: str) -> tuple[str, str | None]:
    """Layer and column of a weight; biases, norms and the embeddings are left to --json."""
    layer, _, weight = path.removeprefix("layers.").partition(".")
    is_matrix = path.endswith(".weight") or ".experts." in path
    return layer, next((column for column in _COLUMNS if is_matrix and weight.startswith(column)), None)


def _cell(differences: list[Difference]) -> str:
    if not differences:
        return ""
    error, norm = (_total(getattr(d, name) for d in differences) for name in ("error", "norm"))
    change = _total(d.change or 0.0 for d in differences)
    text = f"{error / norm:.1e}" if norm else "0"
    return f"{text} ({error / change:.2g})" if change else text


def _total(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))
