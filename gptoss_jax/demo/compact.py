"""The demo's weights as they are shipped: the published layout, but only the rows of the vocabulary that are used.

weights.safetensors has the tensors of the Hugging Face layout; beside it weights.json says which ids the rows of
embedding and unembedding belong to, what they were made with, and the SHA-256 of the file.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from convert.export_weights import Trained, Weights
from convert.layouts import SourceTensor, check, source_tensors
from convert.safetensors_reader import SafetensorsFolder, open_folder
from convert.safetensors_writer import write_json, write_safetensors
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError

WEIGHTS = "weights.safetensors"
DESCRIPTION = "weights.json"
_REINSTALL = "install gptoss-jax again"
_ROWS = 8192
"""Of the vocabulary, written at a time."""


@dataclasses.dataclass(frozen=True)
class Compact:
    """Shipped weights whose checksum is right."""

    folder: SafetensorsFolder
    used_ids: Int32[np.ndarray, " ids"]
    config: ModelConfig
    """Of the whole model, with all of the vocabulary."""
    sha256: str

    @classmethod
    def open(cls, weights: Path) -> "Compact":
        """Raises CheckpointError for files that are missing, damaged, or not what the description says."""
        description = weights.with_name(DESCRIPTION)
        for path in (weights, description):
            if not path.is_file():
                raise CheckpointError("the demo's weights are not there", where=str(path), fix=_REINSTALL)
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        try:
            content = json.loads(description.read_text())
            sha256, used_ids = content["sha256"], np.array(content["used_ids"], np.int32)
            compact = ModelConfig.from_json(content["config"], where=str(description))
            vocab_size = int(content["vocab_size"])
        except (ValueError, KeyError, TypeError, OverflowError) as broken:
            raise CheckpointError(f"damaged ({broken!r})", where=str(description), fix=_REINSTALL) from broken
        if found != sha256:
            raise CheckpointError(f"sha256 {found}, expected {sha256}", where=str(weights), fix=_REINSTALL)
        if len(used_ids) != compact.vocab_size or (np.diff(used_ids) <= 0).any() or used_ids[-1] >= vocab_size:
            raise CheckpointError("damaged list of used ids", where=str(description), fix=_REINSTALL)
        folder = open_folder(weights.parent)
        stored = {tensor.name: (tensor.dtype, tensor.shape) for tensor in folder.tensors.values()}
        check(stored, compact, "hugging_face", where=str(weights))
        return cls(folder, used_ids, dataclasses.replace(compact, vocab_size=vocab_size), sha256)

    def slices(self, tensor: SourceTensor) -> Iterator[np.ndarray]:
        """The consecutive values of a tensor of the whole model: rows of ids that are not used are zero."""
        stored = self.folder.tensors[tensor.name]
        values = self.folder.read(tensor.name, 0, stored.num_bytes)
        if "V" not in tensor.holds[0].dims:
            yield values
            return
        used = values.reshape(len(self.used_ids), -1)
        for start in range(0, tensor.shape[0], _ROWS):
            rows = np.zeros((min(_ROWS, tensor.shape[0] - start), used.shape[1]), np.uint8)
            first, last = np.searchsorted(self.used_ids, [start, start + len(rows)])
            rows[self.used_ids[first:last] - start] = used[first:last]
            yield rows


def write_compact(
    weights: Path,
    trained: Trained,
    used_ids: Int32[np.ndarray, " ids"],
    *,
    vocab_size: int,
    made_with: Mapping[str, Any],
) -> Path:
    """Write what a run has trained, a row of the vocabulary for each of the used ids, and its description."""
    values = Weights(weights.parent, trained)
    tensors = list(source_tensors(trained.config, "hugging_face").values())
    partial = weights.with_name(f"{WEIGHTS}.partial")
    write_safetensors(partial, tensors, values.slices)
    partial.rename(weights)
    content = {
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        **made_with,
        "vocab_size": vocab_size,
        "config": trained.config.to_json(),
        "used_ids": used_ids.tolist(),
    }
    write_json(weights.with_name(DESCRIPTION), content)
    return weights
