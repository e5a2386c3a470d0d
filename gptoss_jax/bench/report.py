"""What a run of the benchmark says: rows, the table of them, and the object that --json writes."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from gptoss_jax.bench.roofline import Ceilings, Number, Work
from gptoss_jax.bench.timing import Times

Phase = Literal["decode", "prefill", "kernel"]

_PACKAGES = ("gptoss-jax", "jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "nvidia-cuda-nvcc")
_COMMIT_VARIABLE = "GPTOSS_JAX_COMMIT"  # where the sources are a copy without their history
_HEADER = (
    "model",
    "phase",
    "batch",
    "context",
    "ms",
    "spread",
    "tokens/s",
    "floor ms",
    "roofline",
    "peak GB",
    "launches",
)
_WIDTHS = (8, 24, 6, 8, 10, 8, 11, 9, 9, 8, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. Of a prefill, `context` is the prompt's length; of a kernel, `batch` is the tokens it gets."""

    model: str
    phase: Phase
    kernel: str | None
    left_out: str | None
    """None but in a row of --split: the stage that this run left out (`split.LeftOut`)."""
    batch: int
    context: int
    ms: float
    """Median: of a step, of a prompt's first token, of one call of a kernel."""
    spread: float
    """From the 10th to the 90th percentile, in milliseconds."""
    tokens_per_s: float
    floor_ms: float
    roofline_fraction: float
    bytes: Number
    """What must be read, and `flops` what must be computed: floor_ms is these over the run's ceilings."""
    flops: Number
    peak_bytes: int | None
    """The most that JAX has held on the device up to the end of this row, weights included."""
    temporary_bytes: int | None
    launches: int | None
    compile_s: float | None
    distinct_tokens: float | None
    """Decoding: different tokens among the rows, on average over the steps. Few of them touch few experts."""
    details: dict[str, float]
    """Milliseconds by name, of the parts of a kernel row."""

    @classmethod
    def of(
        cls,
        model: str,
        phase: Phase,
        work: Work,
        ceilings: Ceilings,
        times: Times,
        *,
        batch: int,
        context: int,
        num_tokens: int,
        kernel: str | None = None,
        left_out: str | None = None,
        launches: int | None = None,
        compile_s: float | None = None,
        temporary_bytes: int | None = None,
        distinct_tokens: float | None = None,
        details: dict[str, float] | None = None,
    ) -> "Row":
        """The row of `times` for `work`; the memory's peak is read now."""
        floor = ceilings.floor_ms(work)
        return cls(
            model=model,
            phase=phase,
            kernel=kernel,
            left_out=left_out,
            batch=batch,
            context=context,
            ms=times.median,
            spread=times.spread,
            tokens_per_s=1e3 * num_tokens / times.median,
            floor_ms=floor,
            roofline_fraction=floor / times.median,
            bytes=work.bytes,
            flops=work.flops,
            peak_bytes=peak_bytes(),
            temporary_bytes=temporary_bytes,
            launches=launches,
            compile_s=compile_s,
            distinct_tokens=distinct_tokens,
            details=details or {},
        )

    def __str__(self) -> str:
        name = self.phase if self.kernel is None else self.kernel
        peak = "-" if self.peak_bytes is None else f"{self.peak_bytes / 1e9:.2f}"
        return _line(
            self.model,
            name,
            self.batch,
            self.context,
            f"{self.ms:.4g}",
            f"{self.spread:.2g}",
            f"{self.tokens_per_s:.0f}",
            f"{self.floor_ms:.3g}",
            f"{self.roofline_fraction:.0%}",
            peak,
            "-" if self.launches is None else self.launches,
        )


class Table:
    """Rows on the standard output, each when it is known."""

    def line(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def header(self) -> None:
        self.line(_line(*_HEADER))

    def row(self, row: Row) -> None:
        self.line(str(row))


def peak_bytes() -> int | None:
    """The most bytes JAX has held on the default device; None where it keeps no count."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if not statistics else statistics.get("peak_bytes_in_use")


def surroundings(command: str) -> dict[str, Any]:
    """What a figure depends on besides the code: device, driver, versions, commit, date."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "driver": nvidia_smi("driver_version"),
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def write(path: Path, report: dict[str, Any], rows: Sequence[Any]) -> None:
    """Write the object of --json."""
    content = report | {"rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def nvidia_smi(query: str) -> str | None:
    """One property of the first NVIDIA GPU that this process sees, or None where there is no such tool or GPU.

    The tool rather than JAX: it answers before JAX has started, and counts what other libraries hold. It does not heed
    CUDA_VISIBLE_DEVICES, so it is told the first entry, an index or a UUID; it knows no part of a divided GPU.
    """
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if not card or shutil.which("nvidia-smi") is None:
        return None
    answer = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={card}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def commit() -> str | None:
    """Of the sources that run, or None where there is no telling."""
    if named := os.environ.get(_COMMIT_VARIABLE):
        return named
    folder = Path(__file__).parent
    if shutil.which("git") is not None:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode == 0:
            return answer.stdout.strip()
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(*cells: object) -> str:
    left, right = cells[:2], cells[2:]
    texts = [f"{cell!s:<{width}}" for cell, width in zip(left, _WIDTHS, strict=False)]
    texts += [f"{cell!s:>{width}}" for cell, width in zip(right, _WIDTHS[2:], strict=True)]
    return " ".join(texts)
