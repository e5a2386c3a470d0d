"""`gptoss-jax demo`: what it says is what it did, again and again, and never on top of somebody's files.

Of the small model's weights, which have learned nothing; tests/demo/test_trained.py has the shipped ones.
"""

import io
import json
from pathlib import Path

import pytest

from gptoss_jax.config import ModelConfig, gpt_oss_20b
from gptoss_jax.demo import CONVERTED, PUBLISHED, checkpoint, make_checkpoint, pipeline, run
from gptoss_jax.demo.compact import Compact
from gptoss_jax.demo.pipeline import QUESTIONS, TOOL_QUESTION
from gptoss_jax.errors import ConversionError
from gptoss_jax.manifest import read_manifest
from tests.demo.conftest import SMALL


@pytest.fixture(autouse=True)
def shipped(small_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model's weights where the shipped ones belong."""
    monkeypatch.setattr(pipeline, "SHIPPED", small_weights)
    return small_weights


@pytest.fixture
def made(shipped: Path, tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "demo")


@pytest.mark.slow
def test_demo_over_an_earlier_one_asks_at_every_level_and_offers_a_tool(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is cut off."""
    monkeypatch.setattr(pipeline, "_MOST_TOKENS", 4)
    earlier = read_manifest(made)
    output = io.StringIO()
    assert run(made.parent, output=output) == made
    lines = output.getvalue().splitlines()
    assert [line.split()[0] for line in lines if line.endswith(" s")] == ["publish", "convert", "verify", "restore"]
    asked = [line for line in lines if line.startswith("> ")]
    assert asked == [
        *(f"> {question}   (reasoning {level})" for level, question in QUESTIONS.items()),
        f"> {TOOL_QUESTION}   (reasoning low, with a tool)",
    ]
    assert all(lines[lines.index(question) + 1] for question in asked), "an answer"
    assert any("a tiny model for trying the software, not gpt-oss" in line for line in lines)
    assert any(line.endswith(f"gptoss-jax chat {made}") for line in lines), "what to try next"
    assert read_manifest(made) == earlier, "the same bytes"
    assert ModelConfig.read(made / "config.json") == SMALL


def test_checkpoint_that_is_there_is_kept(made: Path) -> None:
    written = (made / "manifest.json").stat().st_mtime_ns
    assert make_checkpoint(made.parent) == made
    assert (made / "manifest.json").stat().st_mtime_ns == written


def test_weights_have_a_folder_of_their_own_in_the_cache(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = make_checkpoint()
    assert found == tmp_path / "gptoss-jax" / f"demo-{Compact.open(shipped).sha256[:12]}" / CONVERTED
    assert found.with_name(PUBLISHED) == checkpoint(shipped)


def test_what_a_killed_demo_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".{PUBLISHED}.x1y2z3" / PUBLISHED).mkdir(parents=True)
    (tmp_path / f"{CONVERTED}.partial").mkdir()
    assert make_checkpoint(tmp_path) == tmp_path / CONVERTED


def test_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "model" / PUBLISHED).mkdir(parents=True)
    (tmp_path / "model" / PUBLISHED / "config.json").write_text(json.dumps(gpt_oss_20b().to_json()))
    for name in ("file", "notes", "model"):
        with pytest.raises(ConversionError, match=r"holds something other.*: name a new or an empty directory"):
            make_checkpoint(tmp_path / name)


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match=r"cannot go on \(.*file"):
        make_checkpoint(tmp_path / "file" / "demo")
