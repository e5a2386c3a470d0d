"""The card that the Hopper kernels' work is cut for, an H100 or H200 with SXM, and a constant of their arithmetic."""

import math

NUM_MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024
"""Of shared memory, the most that a block may have."""
LOG2_E = math.log2(math.e)
"""Exponentials are taken in base 2."""
