"""The o200k_base vocabulary file, found or rebuilt without a network.

openai-harmony downloads `o200k_base.tiktoken` unless the variable TIKTOKEN_ENCODINGS_BASE names a folder that holds it
(openai/harmony, src/tiktoken_ext/public_encodings.rs). The PyPI package bpe-openai ships the same file, gzipped, so an
installed gptoss-jax already has every byte it needs.
"""

import gzip
import hashlib
import os
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from gptoss_jax.errors import VocabularyError

FOLDER_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"
FILE_NAME = "o200k_base.tiktoken"
NUM_BYTES = 3_613_922
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def vocabulary_folder() -> Path:
    """Return a folder that holds the published vocabulary file, its hash checked.

    A folder the user named in TIKTOKEN_ENCODINGS_BASE is taken as it is, or refused. Otherwise the file lives in the
    user's cache folder and is rebuilt whenever it is missing or damaged.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        path = Path(named) / FILE_NAME
        if not _is_published(path):
            what = "not the published vocabulary" if path.exists() else "no vocabulary"
            raise VocabularyError(
                what, where=str(path), fix=f"put the published {FILE_NAME} there, or unset {FOLDER_VARIABLE}"
            )
        return path.parent
    path = cache_folder() / FILE_NAME
    if not _is_published(path):
        _write_atomically(path, _packaged_vocabulary())
    return path.parent


def _is_published(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != NUM_BYTES:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def cache_folder() -> Path:
    """The user's cache folder; a relative XDG_CACHE_HOME is ignored, as the XDG base directory specification says."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if Path(named).is_absolute():
        return Path(named) / "gptoss-jax"
    try:
        return Path.home() / ".cache" / "gptoss-jax"
    except RuntimeError as error:
        raise VocabularyError("no home folder", where="cache of the vocabulary", fix="set XDG_CACHE_HOME") from error


def _packaged_vocabulary() -> bytes:
    """Read the vocabulary out of bpe-openai's files; importing that package would load 74 MB of unneeded code."""
    reinstall = "pip install --force-reinstall 'bpe-openai>=0.1.4'"
    try:
        path = Path(str(distribution("bpe-openai").locate_file(f"bpe_openai/data/{FILE_NAME}.gz")))
        content = gzip.decompress(path.read_bytes())
    except PackageNotFoundError as error:
        raise VocabularyError("bpe-openai is not installed", where=FILE_NAME, fix=reinstall) from error
    except (OSError, EOFError) as error:
        raise VocabularyError(
            f"bpe-openai holds no readable vocabulary ({error})", where=FILE_NAME, fix=reinstall
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise VocabularyError(f"sha256 {found} is not the published {SHA256}", where=str(path), fix=reinstall)
    return content


def _write_atomically(path: Path, content: bytes) -> None:
    """Write beside the destination, then rename: a second process sees no file or a whole one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as unfinished:
            unfinished.write(content)
        Path(unfinished.name).replace(path)
    except OSError as error:
        raise VocabularyError(
            f"cannot write the vocabulary ({error.strerror})",
            where=str(path),
            fix=f"set XDG_CACHE_HOME to a folder that can be written, or {FOLDER_VARIABLE} to one with {FILE_NAME}",
        ) from error
