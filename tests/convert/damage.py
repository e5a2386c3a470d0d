"""Change one tensor of a published checkpoint, keeping the files well-formed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]


def edit(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Apply `change` to all tensors of the folder, and write them as one file without an index."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        # A copy: the file is deleted while the values live on.
        tensors |= {name: np.array(values) for name, values in load_file(file).items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
