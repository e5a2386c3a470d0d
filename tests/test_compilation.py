"""The persistent compilation cache: on where it should be, the user's own settings untouched."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from gptoss_jax import compilation
from gptoss_jax.compilation import enable_cache

PROGRAM = """if True:
    import sys
    from pathlib import Path
    import jax
    from jax._src import monitoring
    from gptoss_jax.compilation import enable_cache

    hits = []
    monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
    jax.jit(lambda x: x - 1)(1.0)  # compiled before the cache is on: must not turn it off for good
    folder = enable_cache(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    assert enable_cache() in (folder, None)
    jax.jit(lambda x: jax.numpy.linalg.qr(x @ x))(jax.numpy.ones((64, 64)))
    print(folder, len(hits), jax.config.jax_persistent_cache_min_compile_time_secs)
"""


def run(*arguments: str, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment | {"JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.split()


def test_second_process_compiles_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert run(str(folder), **always) == [str(folder), "0", "0.0"]
    assert list(folder.glob("*-cache"))
    assert int(run(str(folder), **always)[1]) > 0
    assert folder.stat().st_mode & 0o77 == 0, "nobody else may write what this user runs"


def test_what_the_user_chose_stays(tmp_path: Path) -> None:
    own, ours = tmp_path / "own", tmp_path / "ours"
    always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert run(str(ours), JAX_COMPILATION_CACHE_DIR=str(own), **always)[0] == str(own)
    assert run(str(ours), JAX_ENABLE_COMPILATION_CACHE="false")[0] == "None"
    assert not ours.exists()
    assert list(own.glob("*-cache"))
    assert run(str(ours))[2] == "0.5"


def test_no_cache_on_a_cpu_unless_asked_for(tmp_path: Path) -> None:
    assert run(XDG_CACHE_HOME=str(tmp_path))[0] == "None"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def settings() -> Iterator[None]:
    """JAX's settings of the cache, put back."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.mark.usefixtures("settings")
def test_users_cache_folder_on_an_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert enable_cache() == tmp_path / "gptoss-jax" / "xla"
    assert enable_cache() == tmp_path / "gptoss-jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "gptoss-jax" / "xla")


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("chosen", "kept"), [(1.0, 0.5), (0.0, 0.0), (20.0, 20.0)])
def test_shortest_compilation_set_in_the_program_stays(
    chosen: float, kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", chosen)
    assert enable_cache(tmp_path / "cache") == tmp_path / "cache"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == kept


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(("mode", "used"), [(0o700, True), (0o755, True), (0o770, False), (0o707, False)])
def test_folder_that_others_can_write_to_is_not_used(
    mode: int, used: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    assert enable_cache(folder) == (folder if used else None)
    assert ("other users can write here" in caplog.text) is not used
    assert jax.config.jax_compilation_cache_dir == (str(folder) if used else None)


@pytest.mark.usefixtures("settings")
def test_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "_ROOT", -1)
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert enable_cache(tmp_path / "cache") is None
    assert "other users can write here" in caplog.text


def test_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert enable_cache(tmp_path / "file" / "cache") is None
    assert "compiled programs are not kept" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None
