"""Open what a user names as the source of a conversion: a folder, its `original/` subfolder, or hf://owner/name."""

import dataclasses
from pathlib import Path

from convert import layouts
from convert.layouts import LayoutName, SourceTensor
from convert.safetensors_reader import SafetensorsFolder, open_folder
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError, ConversionError
from gptoss_jax.manifest import CONFIG, SourceFile

HUB_PREFIX = "hf://"


@dataclasses.dataclass(frozen=True)
class Source:
    """A published checkpoint whose tensors have been checked against its config.json."""

    folder: SafetensorsFolder
    config: ModelConfig
    layout: LayoutName
    tensors: dict[str, SourceTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def in_file_order(self) -> list[SourceTensor]:
        """The tensors as they follow one another on the disk."""
        stored = self.folder.tensors
        return sorted(self.tensors.values(), key=lambda t: (stored[t.name].file.name, stored[t.name].offset))

    def files(self) -> tuple[SourceFile, ...]:
        """The safetensors files, by name."""
        return tuple(SourceFile(file.name, file.stat().st_size) for file in self.folder.files)


def open_source(name: str | Path) -> Source:
    """Open a published checkpoint and check every tensor's name, dtype and shape; read no tensor yet."""
    path = _download(name) if isinstance(name, str) and name.startswith(HUB_PREFIX) else Path(name)
    if not path.is_dir():
        raise CheckpointError(
            "no such folder", where=str(path), fix=f"name a checkpoint folder or {HUB_PREFIX}owner/name"
        )
    if not any(path.glob("*.safetensors*")) and (path / "original").is_dir():
        path /= "original"
    folder = open_folder(path)
    config = ModelConfig.read(path / CONFIG)
    if config.num_layers > len(folder.tensors):  # before listing what each layer should hold
        raise CheckpointError(
            f"{config.num_layers} layers by its config.json, {len(folder.tensors)} tensors in its files",
            where=str(path),
            fix="download the checkpoint and its config.json again",
        )
    layout = layouts.detect(folder.tensors.keys(), where=str(path))
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in folder.tensors.values()}
    return Source(folder, config, layout, layouts.check(found, config, layout, where=str(path)))


def _download(name: str) -> Path:
    """Fetch a repository of the Hugging Face hub into its cache, without the second copy in `original/`."""
    repository = name.removeprefix(HUB_PREFIX)
    if repository.count("/") != 1:
        raise ConversionError(f"{name} is no repository", where="source", fix=f"write {HUB_PREFIX}owner/name")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError as missing:
        raise ConversionError(
            "huggingface_hub is not installed", where=name, fix="pip install 'gptoss-jax[hub]', or name a folder"
        ) from missing
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["original/*", "metal/*"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as failed:
        reason = str(failed).strip().partition("\n")[0]
        raise ConversionError(
            f"cannot download ({reason})", where=name, fix="check the name and the network, or name a folder"
        ) from failed
