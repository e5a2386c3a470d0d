"""Published checkpoints of the tiny architecture, and what converting them gives, made once for all tests."""

import shutil
from pathlib import Path

import pytest

from convert.converter import convert
from convert.synthetic import write_checkpoint
from tests.tiny import TINY

LAYOUTS = ("hf", "original", "bf16")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each layout; not to be changed."""
    root = tmp_path_factory.mktemp("published")
    for layout in LAYOUTS:
        write_checkpoint(root / layout, TINY, seed=1, layout=layout)
    return root


@pytest.fixture(scope="session")
def converted(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face layout, converted; not to be changed."""
    destination = tmp_path_factory.mktemp("converted") / "tiny"
    convert(pristine / "hf", destination)
    return destination


@pytest.fixture
def published(pristine: Path, tmp_path: Path) -> Path:
    """A Hugging Face layout of one's own, to damage."""
    return Path(shutil.copytree(pristine / "hf", tmp_path / "published"))
