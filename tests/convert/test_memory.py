"""Resident memory while converting, verifying, restoring and exporting, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from convert.converter import convert
from convert.synthetic import write_checkpoint
from tests.medium import MEDIUM, MEDIUM_MB

# Peak resident memory in MB after each step; the first converts a tiny checkpoint, so that all imports are counted.
_MEASURE = """
import json, resource, sys
from pathlib import Path
from convert.converter import convert
from convert.verify import verify

def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

small, large, out, quantize = sys.argv[1:]
quantize = quantize == "quantize"
peaks = []
for source, name in ((small, "small"), (large, "large")):
    convert(source, Path(out, name), quantize=quantize)
    peaks.append(peak())
verify(Path(out, "large"), large)
peaks.append(peak())
print(json.dumps(peaks))
"""

# The same while exporting; checkpoints as they come from the first script.
_EXPORT = """
import json, resource, sys
from pathlib import Path
from convert.export import export
from tests.convert import stand_in_run

small, large, out, dtype, trained = sys.argv[1:]
peaks = []
for converted, name in ((small, "small"), (large, "large")):
    if trained == "lora":
        run = stand_in_run.lora_run(Path(converted), rank=1)
        import convert.export
        convert.export._open_run = lambda directory, **where: run
    export(Path(converted), Path(out, f"exported-{name}"), dtype=dtype)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
print(json.dumps(peaks))
"""


def measure(script: str, *arguments: str) -> list[float]:
    command = [sys.executable, "-c", script, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hf", "original", "bf16"])
def test_peak_grows_by_slices_not_by_the_checkpoint(layout, pristine: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", MEDIUM, layout=layout)
    assert MEDIUM_MB > 140
    quantize = "quantize" if layout == "bf16" else "keep"
    small, large, verified = measure(
        _MEASURE, str(pristine / layout), str(tmp_path / "source"), str(tmp_path), quantize
    )
    assert large - small < 30
    assert verified - large < 30


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["untouched", "lora"])
@pytest.mark.parametrize("dtype", ["mxfp4", "bf16"])
def test_exporting_holds_slices_too(dtype: str, trained: str, converted: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", MEDIUM)
    convert(tmp_path / "source", tmp_path / "large")
    small, large = measure(_EXPORT, str(converted), str(tmp_path / "large"), str(tmp_path), dtype, trained)
    assert large - small < 30
