"""Expert matrices on the host, one expert at a time: packed in MXFP4, and written out."""

import jax
import ml_dtypes
import numpy as np

from pallas_kernels import mxfp4

_quantize = jax.jit(mxfp4.quantize)
_dequantize = jax.jit(mxfp4.dequantize)


def quantized(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of a finite matrix [..., out, in]."""
    packed = _quantize(matrix)
    return np.asarray(packed.blocks), np.asarray(packed.scales)


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The float32 matrix [..., out, in]."""
    return np.asarray(_dequantize(mxfp4.MXFP4(blocks, scales)))


def in_out(matrix: np.ndarray) -> np.ndarray:
    """A matrix [..., out, in] as the bf16 layout keeps it: bfloat16 [..., in, out]."""
    return np.ascontiguousarray(matrix.astype(ml_dtypes.bfloat16).swapaxes(-1, -2))
