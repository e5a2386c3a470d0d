"""`gptoss-jax demo`: what it says is what it did, again and again, and never on top of somebody's files."""

import io
import json
from pathlib import Path

import pytest

from convert.verify import verify
from gptoss_jax.config import ModelConfig, gpt_oss_20b
from gptoss_jax.demo import CONVERTED, PUBLISHED, QUESTION, checkpoint, make_checkpoint, pipeline, run
from gptoss_jax.demo.compact import Compact
from gptoss_jax.demo.pipeline import QUESTIONS, TOOL_QUESTION
from gptoss_jax.errors import ConversionError
from gptoss_jax.manifest import read_manifest


@pytest.mark.slow
def test_demo_over_an_earlier_one(demo_checkpoint: Path) -> None:
    """The first one is the fixture's."""
    earlier = read_manifest(demo_checkpoint)
    output = io.StringIO()
    assert run(demo_checkpoint.parent, output=output) == demo_checkpoint
    lines = output.getvalue().splitlines()
    steps = [line.split()[0] for line in lines if line.endswith(" s")]
    assert steps == ["publish", "convert", "verify", "restore", "chat", "again"]
    assert "2 safetensors files, 51.68 MB" in output.getvalue()
    chat = lines.index(f"> {QUESTION}")
    assert lines[chat + 1], "an answer"
    assert any("weights are random" in line for line in lines[chat + 2 :])
    assert any(line.endswith(f"gptoss-jax chat {demo_checkpoint}") for line in lines), "what to try next"

    assert read_manifest(demo_checkpoint) == earlier, "the same seed, the same bytes"
    assert verify(demo_checkpoint, demo_checkpoint.parent / PUBLISHED).num_bytes > 50e6


def test_published_layout_has_two_shards_and_the_real_vocabulary(demo_checkpoint: Path) -> None:
    published = demo_checkpoint.parent / PUBLISHED
    index = json.loads((published / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in published.glob("*.safetensors"))
    assert len(set(index["weight_map"].values())) == 2
    assert ModelConfig.read(published / "config.json").vocab_size == 201088


def test_checkpoint_that_is_there_is_kept(demo_checkpoint: Path) -> None:
    made = (demo_checkpoint / "manifest.json").stat().st_mtime_ns
    assert make_checkpoint(demo_checkpoint.parent) == demo_checkpoint
    assert (demo_checkpoint / "manifest.json").stat().st_mtime_ns == made


def test_default_directory_is_in_the_cache(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gptoss-jax").mkdir()
    (tmp_path / "gptoss-jax" / "demo").symlink_to(demo_checkpoint.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert make_checkpoint() == tmp_path / "gptoss-jax" / "demo" / CONVERTED


@pytest.fixture
def shipped(small_weights, monkeypatch):
    """The small model's weights where the shipped ones belong."""
    monkeypatch.setattr(pipeline, "SHIPPED", small_weights)


@pytest.mark.slow
def test_demo_of_shipped_weights_asks_at_every_level_and_offers_a_tool(
    shipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have learned nothing yet, so each answer is cut off."""
    monkeypatch.setattr(pipeline, "_MOST_TOKENS", 4)
    output = io.StringIO()
    converted = run(tmp_path / "demo", output=output)
    lines = output.getvalue().splitlines()
    assert "trained weights" in lines[0]
    assert [line.split()[0] for line in lines if line.endswith(" s")] == ["publish", "convert", "verify", "restore"]
    asked = [line for line in lines if line.startswith("> ")]
    assert asked == [
        *(f"> {question}   (reasoning {level})" for level, question in QUESTIONS.items()),
        f"> {TOOL_QUESTION}   (reasoning low, with a tool)",
    ]
    assert all(lines[lines.index(question) + 1] for question in asked), "an answer"
    assert any("a tiny model for trying the software, not gpt-oss" in line for line in lines)
    assert ModelConfig.read(converted / "config.json").num_experts == 8
    assert make_checkpoint(tmp_path / "demo") == converted


def test_weights_have_a_folder_of_their_own_in_the_cache(
    shipped: None, small_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = make_checkpoint()
    assert found == tmp_path / "gptoss-jax" / f"demo-{Compact.open(small_weights).sha256[:12]}" / CONVERTED
    assert found.with_name(PUBLISHED) == checkpoint(small_weights)


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
    with pytest.raises(ConversionError, match="cannot write"):
        make_checkpoint(tmp_path / "file" / "demo")
