"""The values that `export` writes: those of a converted checkpoint, or what a fine-tuning run has made of them.

What a run did not train is written byte for byte, and compared with the checkpoint's checksums on the way. What it did
train is made exactly in float32, a few rows or one expert at a time, and rounded once.
"""

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.expert_matrices import dequantized, in_out, quantized
from convert.export_report import Difference
from convert.layouts import SourceTensor
from convert.verify import checked_rows
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError
from gptoss_jax.finetune.trained import Trained
from gptoss_jax.manifest import CONFIG, chunk_shape, read_manifest
from gptoss_jax.parameters import Parameter, parameters
from pallas_kernels.mxfp4 import refuse_nonfinite


class Weights:
    """Every tensor of a layout, slice by slice; `differences` is complete when all of them have been read."""

    def __init__(self, directory: Path, run: Trained | None = None) -> None:
        """`directory` is the converted checkpoint, or where the run lies."""
        self._where = str(directory)
        self._run = run
        self._checkpoint = directory if run is None else run.base
        # A run that holds every parameter needs no checkpoint beside it.
        is_whole = run is not None and run.lora is None
        if run is not None and not is_whole:
            run.check_base()
        self._checksums = {} if is_whole else read_manifest(self._checkpoint).sha256
        if run is not None and not is_whole and ModelConfig.read(self._checkpoint / CONFIG) != run.config:
            raise CheckpointError(
                "run and checkpoint are of different architectures",
                where=f"{directory} and {self._checkpoint}",
                fix="name the checkpoint it started from with --base",
            )
        self._sums: dict[str, np.ndarray] = {}
        self._scales: dict[str, list[np.ndarray]] = {}

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Of every weight that was trained, in the order of writing."""
        found = []
        for path, squares in self._sums.items():
            norm, error, change = np.sqrt(squares).tolist()
            found.append(Difference(path, norm, error, None if np.isnan(change) else change))
        return tuple(found)

    def slices(self, tensor: SourceTensor) -> Iterator[np.ndarray]:
        """The consecutive values of a tensor. A matrix's blocks are to be read before its scales."""
        if tensor.is_dequantized:
            yield from self._dequantized(*tensor.holds)
        else:
            for parameter in tensor.holds:
                yield from self._rows(parameter)

    def _rows(self, parameter: Parameter) -> Iterator[np.ndarray]:
        if not self._is_trained(parameter):
            yield from self._stored(parameter)
        elif parameter.leaf == "blocks":
            self._scales[_weight(parameter)] = []  # tens of MB at most, until their turn comes
            for exact, change in self._exact_matrices(parameter):
                blocks, scales = quantized(exact)
                self._compare(parameter, dequantized(blocks, scales), exact, change)
                self._scales[_weight(parameter)].append(scales)
                yield blocks
        elif parameter.leaf == "scales":
            yield from self._scales.pop(_weight(parameter))
        else:
            for exact, change in self._exact_rows(parameter):
                written = exact.astype(ml_dtypes.bfloat16)
                self._compare(parameter, written, exact, change)
                yield written

    def _dequantized(self, blocks: Parameter, scales: Parameter) -> Iterator[np.ndarray]:
        if self._run is None or not self._is_trained(blocks):
            yield from map(in_out, self._stored_matrices(blocks, scales))
            return
        for exact, change in self._exact_matrices(blocks):
            # Quantization-aware training has trained what MXFP4 makes of its weights, so that is written.
            trained = dequantized(*quantized(exact)) if self._run.method == "qat" else exact
            written = trained.astype(ml_dtypes.bfloat16)
            self._compare(blocks, written, exact, change)
            yield in_out(written)

    def _is_trained(self, parameter: Parameter) -> bool:
        if self._run is None:
            return False
        return (f"{_weight(parameter)}.lora_b" if self._run.lora else _master(parameter)) in self._run.shapes

    def _exact_rows(self, parameter: Parameter) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Runs of rows as trained, in float32, and how far they are from the checkpoint's, if the run says so."""
        run, path = self._run, parameter.path
        assert run is not None
        num_rows = chunk_shape(parameter)[0]
        starts = range(0, parameter.shape[0], num_rows)
        if run.lora is None:
            for start in starts:
                yield self._finite(path, start, run.read(path, slice(start, start + num_rows))), None
            return
        a = run.read(f"{path}.lora_a")
        for start, rows in zip(starts, self._stored(parameter), strict=True):
            b = run.read(f"{path}.lora_b", slice(start, start + num_rows))
            change = np.float32(run.lora.scale) * np.tensordot(b, a, axes=1)
            yield self._finite(path, start, rows.astype(np.float32) + change), change

    def _exact_matrices(self, blocks: Parameter) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The same of an expert matrix, one expert [1, out, in] at a time."""
        run, name = self._run, _weight(blocks)
        assert run is not None
        experts = range(blocks.shape[0])
        if run.lora is None:
            for expert in experts:
                yield self._finite(name, expert, run.read(_master(blocks), slice(expert, expert + 1))), None
            return
        scales = parameters(run.config)[blocks.path.removesuffix("blocks") + "scales"]
        for expert, matrix in zip(experts, self._stored_matrices(blocks, scales), strict=True):
            a, b = (run.read(f"{name}.lora_{side}", slice(expert, expert + 1)) for side in "ab")
            change = np.float32(run.lora.scale) * (b @ a)
            yield self._finite(name, expert, matrix + change), change

    def _stored(self, parameter: Parameter) -> Iterator[np.ndarray]:
        return checked_rows(self._checkpoint, parameter, self._checksums[parameter.path])

    def _stored_matrices(self, blocks: Parameter, scales: Parameter) -> Iterator[np.ndarray]:
        """The checkpoint's expert matrix in float32, one expert [1, out, in] at a time."""
        packed = (self._stored(blocks), self._stored(scales))
        for expert_blocks, expert_scales in zip(*map(_one_by_one, packed), strict=True):
            yield dequantized(expert_blocks, expert_scales)

    def _compare(self, parameter: Parameter, written: np.ndarray, exact: np.ndarray, change: np.ndarray | None) -> None:
        error = written.astype(np.float32, copy=False) - exact
        squares = [np.nan if values is None else _sum_of_squares(values) for values in (exact, error, change)]
        self._sums[_weight(parameter)] = self._sums.get(_weight(parameter), 0.0) + np.array(squares)

    def _finite(self, path: str, start: int, values: np.ndarray) -> np.ndarray:
        try:
            refuse_nonfinite(values)
        except ValueError as refused:
            raise CheckpointError(
                f"{path}[{start}:{start + len(values)}]: {refused}", where=self._where, fix="export an earlier step"
            ) from refused
        return values


def _weight(parameter: Parameter) -> str:
    """The path of the weight that a parameter is, or is half of: `layers.0.experts.down` of its blocks and scales."""
    return parameter.path.removesuffix(".blocks").removesuffix(".scales")


def _master(parameter: Parameter) -> str:
    """What a run that trains whole weights calls it."""
    return parameter.path if parameter.dtype == "bfloat16" else f"{_weight(parameter)}.weight"


def _sum_of_squares(values: np.ndarray) -> float:
    """In float32 along a row, in float64 over the rows."""
    return float(np.vecdot(values, values).sum(dtype=np.float64))


def _one_by_one(runs: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows of all runs, one at a time, each still with its first dim."""
    for rows in runs:
        for start in range(len(rows)):
            yield rows[start : start + 1]
