"""From the weights that are shipped to a whole checkpoint in the published layout, in the user's cache folder."""

import json
import shutil
import tempfile
from pathlib import Path

from convert.destination import check_space, named_disk_errors
from convert.layouts import source_tensors
from convert.published import write_configs
from convert.safetensors_writer import write_json, write_safetensors
from gptoss_jax.demo.compact import WEIGHTS, Compact
from gptoss_jax.harmony.vocabulary import cache_folder

SHIPPED = Path(__file__).with_name(WEIGHTS)
FILE = "model.safetensors"
PUBLISHED = "published"
ORIGIN = "demo.json"


def checkpoint(weights: Path = SHIPPED) -> Path:
    """The demo model in the published Hugging Face layout, in the user's cache folder, made if it is not there.

    Raises CheckpointError if the shipped weights are missing or damaged, ConversionError if the folder cannot be
    written.

    Example:
        >>> from convert.converter import convert
        >>> convert(checkpoint(), Path("demo"))  # doctest: +SKIP
    """
    return expand(home(Compact.open(weights)) / PUBLISHED, weights)


def home(compact: Compact) -> Path:
    """Where in the user's cache folder these weights, and none that come after them, are expanded and converted."""
    return cache_folder() / f"demo-{compact.sha256[:12]}"


def expand(directory: Path, weights: Path = SHIPPED) -> Path:
    """Write the whole checkpoint into `directory`, or leave it if it is that of these weights already."""
    compact = Compact.open(weights)
    tensors = list(source_tensors(compact.config, "hugging_face").values())
    again = "run again"
    if _is_from(directory, compact.sha256):
        return directory
    with named_disk_errors(directory, again=again):
        directory.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own, so that two processes do not meet in it.
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as folder:
            partial = Path(folder) / directory.name
            partial.mkdir()
            check_space(sum(tensor.num_bytes for tensor in tensors), partial, again=again)
            write_safetensors(partial / FILE, tensors, compact.slices)
            write_configs(partial, compact.config, "hugging_face")
            write_json(partial / ORIGIN, {"sha256": compact.sha256, "num_bytes": (partial / FILE).stat().st_size})
            if directory.exists():
                shutil.rmtree(directory)
            partial.rename(directory)
    return directory


def _is_from(directory: Path, sha256: str) -> bool:
    """Whether the directory is a whole expansion of these weights."""
    try:
        origin = json.loads((directory / ORIGIN).read_text())
        return origin == {"sha256": sha256, "num_bytes": (directory / FILE).stat().st_size}
    except (OSError, ValueError):
        return False
