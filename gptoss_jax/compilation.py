"""JAX's persistent compilation cache, in the user's cache folder: a program is compiled once, not once a process."""

import logging
import os
import stat
from pathlib import Path

import jax

from gptoss_jax.errors import VocabularyError
from gptoss_jax.harmony.vocabulary import cache_folder

FOLDER = "xla"
_MIN_COMPILE_SECONDS = 0.5  # what compiles faster than this is not worth a file
_JAX_MIN_COMPILE_SECONDS = 1.0  # JAX's own default; anything else was chosen
_MIN_COMPILE_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_ROOT = 0  # the user who can write everywhere

log = logging.getLogger(__name__)


def enable_cache(folder: Path | None = None) -> Path | None:
    """Keep compiled programs in `folder` (default: `xla` in the user's cache folder); returns the folder in use.

    What the user set in JAX's own way stays: a folder of theirs (`JAX_COMPILATION_CACHE_DIR`), no cache at all
    (`JAX_ENABLE_COMPILATION_CACHE=false`), the shortest compilation that is kept; each may be set by the variable or
    through `jax.config`. Where JAX runs on a CPU there is none by default: its programs are in the instructions of that
    very CPU, and home folders are shared between machines. Beside an accelerator the cache is one for all devices, so
    programs that such a process compiles for its CPU may be kept too. A folder that cannot be made, or that other
    users can write to, costs a warning, not the run. Calling it again changes nothing.

    Example:
        >>> enable_cache(Path("cache"))  # doctest: +SKIP
        PosixPath('cache')
    """
    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    if chosen := jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return Path(chosen)
    if folder is None:
        if jax.default_backend() == "cpu":
            return None
        try:
            folder = cache_folder() / FOLDER
        except VocabularyError:  # no home folder
            return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        log.warning("compiled programs are not kept: %s: %s", error.strerror, folder)
        return None
    # Compiled programs are trusted: who can write here can run code as this user.
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (os.getuid(), _ROOT):
        log.warning("compiled programs are not kept: other users can write here: %s: chmod 700, or remove it", folder)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore[reportAttributeAccessIssue]
    if _MIN_COMPILE_VARIABLE not in os.environ and seconds == _JAX_MIN_COMPILE_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    return folder
