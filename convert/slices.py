"""The rows of every parameter, slice by slice, as a source's tensors hold them.

A published MXFP4 checkpoint gives its own bytes. A dequantized one is quantized here, one expert at a time.
"""

import functools
import math
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from convert.layouts import SourceTensor
from convert.safetensors_reader import SafetensorsFolder
from convert.zarr import chunk_shape, numpy_dtype
from gptoss_jax.errors import CheckpointError
from gptoss_jax.parameters import Parameter

_NAN_SCALE = 255
"""The e8m0 byte that means NaN (OCP Microscaling Formats v1.0); no published weight holds one."""


def parameter_slices(folder: SafetensorsFolder, tensor: SourceTensor) -> Iterator[tuple[Parameter, np.ndarray]]:
    """Yield each parameter of `tensor` in runs of rows that fill one chunk row, in order.

    The arrays show mapped file pages: let go of one before taking the next, and only one is resident. Raises
    CheckpointError for a scale byte of 255.
    """
    slices = _quantized(folder, tensor) if tensor.is_dequantized else _published(folder, tensor)
    for parameter, start, rows in slices:
        if parameter.leaf == "scales":
            _refuse_nan_scales(rows, start, tensor, folder)
        yield parameter, rows


def _published(folder: SafetensorsFolder, tensor: SourceTensor) -> Iterator[tuple[Parameter, int, np.ndarray]]:
    offset = 0
    for parameter in tensor.holds:
        num_rows = chunk_shape(parameter)[0]
        row_bytes = parameter.num_bytes // parameter.shape[0]
        for start in range(0, parameter.shape[0], num_rows):
            first = offset + start * row_bytes
            mapped = folder.read(tensor.name, first, first + num_rows * row_bytes)
            yield parameter, start, mapped.view(numpy_dtype(parameter)).reshape(num_rows, *parameter.shape[1:])
        offset += parameter.num_bytes


def _quantized(folder: SafetensorsFolder, tensor: SourceTensor) -> Iterator[tuple[Parameter, int, np.ndarray]]:
    blocks, scales = tensor.holds
    num_experts, num_inputs, num_outputs = tensor.shape
    expert_bytes = tensor.num_bytes // num_experts
    step = math.lcm(chunk_shape(blocks)[0], chunk_shape(scales)[0])
    for start in range(0, num_experts, step):
        parts = []
        for expert in range(start, start + step):
            mapped = folder.read(tensor.name, expert * expert_bytes, (expert + 1) * expert_bytes)
            matrix = mapped.view(ml_dtypes.bfloat16).reshape(num_inputs, num_outputs)
            _refuse_nonfinite(matrix, expert, tensor, folder)
            parts.append(_quantizer()(matrix))
        yield blocks, start, np.stack([part[0] for part in parts])
        yield scales, start, np.stack([part[1] for part in parts])


@functools.cache
def _quantizer() -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Blocks and scales of one [in, out] matrix; JAX is imported for checkpoints that need it."""
    import jax

    from pallas_kernels.mxfp4 import MXFP4, quantize

    @jax.jit
    def quantize_transposed(matrix: jax.Array) -> MXFP4:
        return quantize(matrix.T)

    def run(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        packed = quantize_transposed(matrix)
        return np.asarray(packed.blocks), np.asarray(packed.scales)

    return run


def _refuse_nan_scales(rows: np.ndarray, start: int, tensor: SourceTensor, folder: SafetensorsFolder) -> None:
    if rows.max() == _NAN_SCALE:
        row, *rest = (int(index) for index in np.argwhere(rows == _NAN_SCALE)[0])
        raise CheckpointError(
            f"scale byte {_NAN_SCALE} (NaN) in {tensor.name} at index {[start + row, *rest]}",
            where=str(folder.tensors[tensor.name].file),
            fix="download it again: no published weight holds one",
        )


def _refuse_nonfinite(matrix: np.ndarray, expert: int, tensor: SourceTensor, folder: SafetensorsFolder) -> None:
    finite = np.isfinite(matrix)
    if not finite.all():
        place = [expert, *(int(index) for index in np.argwhere(~finite)[0])]
        raise CheckpointError(
            f"{tensor.name} is infinite or NaN at index {place}",
            where=str(folder.tensors[tensor.name].file),
            fix="export the checkpoint again with finite weights",
        )
