"""The vocabulary is found or rebuilt offline, and anything else is refused by name."""

import gzip
import os
import socket
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from gptoss_jax.errors import VocabularyError
from gptoss_jax.harmony import vocabulary


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no folder named by the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(vocabulary.FOLDER_VARIABLE, raising=False)
    return tmp_path / "gptoss-jax"


def test_file_is_rebuilt_from_the_package_and_found_again(cache):
    folder = vocabulary.vocabulary_folder()
    assert folder == cache
    assert [path.name for path in cache.iterdir()] == [vocabulary.FILE_NAME]
    written = (cache / vocabulary.FILE_NAME).stat()
    assert vocabulary.vocabulary_folder() == cache
    assert (cache / vocabulary.FILE_NAME).stat().st_mtime_ns == written.st_mtime_ns


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"X" + content[1:]])
def test_damaged_cache_is_rebuilt(cache, damage):
    path = vocabulary.vocabulary_folder() / vocabulary.FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    vocabulary.vocabulary_folder()
    assert path.read_bytes() == whole


def test_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.delenv(vocabulary.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vocabulary.vocabulary_folder() == tmp_path / ".cache" / "gptoss-jax"


def test_users_folder_is_taken_as_it_is(cache, monkeypatch, tmp_path):
    content = (vocabulary.vocabulary_folder() / vocabulary.FILE_NAME).read_bytes()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / vocabulary.FILE_NAME).write_bytes(content)
    monkeypatch.setenv(vocabulary.FOLDER_VARIABLE, str(mine))
    assert vocabulary.vocabulary_folder() == mine


@pytest.mark.parametrize("content", [None, b"IQ== 0\n"])
def test_users_folder_without_the_published_file_is_refused(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / vocabulary.FILE_NAME).write_bytes(content)
    monkeypatch.setenv(vocabulary.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(VocabularyError, match=r"vocabulary: .*o200k_base\.tiktoken: put the published"):
        vocabulary.vocabulary_folder()


def test_missing_package_is_named(cache, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(vocabulary, "distribution", missing)
    with pytest.raises(VocabularyError, match=r"bpe-openai is not installed.*pip install"):
        vocabulary.vocabulary_folder()
    assert not cache.exists()


GZIPPED = gzip.compress(b"IQ== 0\n")


@pytest.mark.parametrize("content", [GZIPPED, b"not gzip", GZIPPED[:12]], ids=["another", "no gzip", "cut short"])
def test_package_with_another_vocabulary_is_refused(cache, monkeypatch, tmp_path, content):
    class Installed:
        def locate_file(self, path):
            return tmp_path / Path(path).name

    (tmp_path / f"{vocabulary.FILE_NAME}.gz").write_bytes(content)
    monkeypatch.setattr(vocabulary, "distribution", lambda name: Installed())
    with pytest.raises(VocabularyError, match=r"not the published|no readable vocabulary"):
        vocabulary.vocabulary_folder()
    assert not cache.exists()


def test_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "gptoss-jax").write_text("a file where the folder should be")
    monkeypatch.delenv(vocabulary.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(VocabularyError, match=r"cannot write the vocabulary.*set XDG_CACHE_HOME"):
        vocabulary.vocabulary_folder()


class Trap:
    """A proxy that counts who tries to reach the network and hangs up."""

    def __enter__(self):
        self.num_visits = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self):
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                return
            self.num_visits += 1
            visitor.close()

    def run(self, program, folder):
        """Run `program` in a fresh process whose caches are empty and whose way out leads here."""
        proxy = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        environment = {key: value for key, value in os.environ.items() if key != vocabulary.FOLDER_VARIABLE}
        environment |= {name: str(folder) for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "TIKTOKEN_RS_CACHE_DIR")}
        environment |= dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), proxy)
        environment |= {"NO_PROXY": "", "no_proxy": ""}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )


def test_encoding_loads_without_touching_the_network(tmp_path):
    with Trap() as trap:
        done = trap.run("from gptoss_jax.harmony.encoding import encode; print(encode('hello'))", tmp_path)
    assert (done.stdout, done.stderr, trap.num_visits) == ("[24912]\n", "", 0)


def test_the_trap_sees_harmony_download_by_itself(tmp_path):
    """The control of the test above: without our folder harmony does go out."""
    program = "import openai_harmony; openai_harmony.load_harmony_encoding('HarmonyGptOss')"
    with Trap() as trap:
        done = trap.run(program, tmp_path)
    assert done.returncode != 0
    assert trap.num_visits > 0
