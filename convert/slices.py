"""The rows of every parameter, slice by slice, as a source's tensors hold them.

A published MXFP4 checkpoint gives its own bytes. A dequantized one is quantized here, one expert at a time.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np

from convert.layouts import SourceTensor
from convert.safetensors_reader import SafetensorsFolder
from convert.zarr import numpy_dtype
from gptoss_jax.errors import CheckpointError
from gptoss_jax.manifest import chunk_shape
from gptoss_jax.parameters import Parameter
from pallas_kernels.mxfp4 import MXFP4, quantize, refuse_invalid_scales, refuse_nonfinite


def parameter_slices(folder: SafetensorsFolder, tensor: SourceTensor) -> Iterator[tuple[Parameter, np.ndarray]]:
    """Yield each parameter of `tensor` in runs of rows that fill one chunk row, in order.

    The arrays show mapped file pages: let go of one before taking the next, and only one is resident. Raises
    CheckpointError for a scale byte of 255.
    """
    slices = _quantized(folder, tensor) if tensor.is_dequantized else _published(folder, tensor)
    for parameter, start, rows in slices:
        if parameter.leaf == "scales":
            with _named(
                tensor, f"{start}:{start + len(rows)}", folder, "download it again: no published weight is NaN"
            ):
                refuse_invalid_scales(rows)
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
            with _named(tensor, f"{expert}", folder, "export the checkpoint again with finite weights"):
                refuse_nonfinite(matrix)
            parts.append(_quantizer()(matrix))
        yield blocks, start, np.stack([part[0] for part in parts])
        yield scales, start, np.stack([part[1] for part in parts])


@functools.cache
def _quantizer() -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Blocks and scales of one [in, out] matrix."""

    @jax.jit
    def quantize_transposed(matrix: jax.Array) -> MXFP4:
        return quantize(matrix.T)

    def run(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        packed = quantize_transposed(matrix)
        return np.asarray(packed.blocks), np.asarray(packed.scales)

    return run


@contextlib.contextmanager
def _named(tensor: SourceTensor, rows: str, folder: SafetensorsFolder, fix: str) -> Iterator[None]:
    """Say in which tensor of which file a value is refused."""
    try:
        yield
    except ValueError as refused:
        file = folder.tensors[tensor.name].file
        raise CheckpointError(f"{tensor.name}[{rows}]: {refused}", where=str(file), fix=fix) from refused
