"""A conversion that stops, by a crash, a full disk or the user, is never complete and can go on."""

import io
import os
import resource
import shutil
from pathlib import Path

import pytest

from convert import converter
from convert.converter import convert
from convert.zarr import ArrayWriter
from gptoss_jax.errors import CheckpointError, ConversionError
from gptoss_jax.manifest import partial_directory, read_manifest


def run(source: Path, destination: Path, **options: bool):
    return convert(source, destination, **options)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parameters opened for writing, in order."""
    opened: list[str] = []

    class Recording(ArrayWriter):
        def __init__(self, directory: Path, *arguments) -> None:
            opened.append(directory.name)
            super().__init__(directory, *arguments)

    monkeypatch.setattr(converter, "ArrayWriter", Recording)
    return opened


@pytest.fixture
def interrupted(pristine: Path, tmp_path: Path) -> Path:
    """The destination of a conversion the user stopped in its 31st parameter."""
    destination = tmp_path / "out"

    class Stopping(ArrayWriter):
        count = 0

        def write(self, rows) -> None:
            Stopping.count += 1
            if Stopping.count == 31:
                raise KeyboardInterrupt
            super().write(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "ArrayWriter", Stopping)
        with pytest.raises(KeyboardInterrupt):
            run(pristine / "hf", destination)
    return destination


def test_interrupted_conversion_is_not_taken_for_complete(interrupted: Path) -> None:
    assert not interrupted.exists()
    for directory in (interrupted, partial_directory(interrupted)):
        with pytest.raises(CheckpointError, match=r"the conversion was interrupted.*--resume"):
            read_manifest(directory)


def test_resume_writes_only_what_is_not_done(
    pristine: Path, interrupted: Path, converted: Path, written: list[str]
) -> None:
    manifest = run(pristine / "hf", interrupted, resume=True)
    assert len(written) == 79 - 30
    assert manifest.sha256 == read_manifest(converted).sha256
    assert [file.name for file in interrupted.parent.iterdir()] == [interrupted.name]


def test_resume_writes_again_what_the_crash_damaged(
    pristine: Path, interrupted: Path, converted: Path, written: list[str]
) -> None:
    arrays = partial_directory(interrupted) / "arrays"
    (arrays / "embedding.weight" / "0.0").write_bytes(b"cut short")
    (arrays / "norm.scale" / "0").unlink()
    assert run(pristine / "hf", interrupted, resume=True).sha256 == read_manifest(converted).sha256
    assert len(written) == 79 - 28
    assert {"embedding.weight", "norm.scale"} <= set(written)


def test_resume_survives_a_journal_line_cut_short(pristine: Path, interrupted: Path, converted: Path) -> None:
    journal = partial_directory(interrupted) / "journal.jsonl"
    journal.write_text(journal.read_text()[:-20])
    assert run(pristine / "hf", interrupted, resume=True).sha256 == read_manifest(converted).sha256


def test_interrupted_conversion_is_not_started_over_unasked(pristine: Path, interrupted: Path) -> None:
    with pytest.raises(ConversionError, match=r"was interrupted.*--resume.*--overwrite"):
        run(pristine / "hf", interrupted)


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
@pytest.mark.parametrize("option", ["overwrite", "resume"])
def test_directory_that_no_conversion_made_is_spared(pristine: Path, tmp_path: Path, name: str, option: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("dear reader")
    with pytest.raises(ConversionError, match=rf"{name}: move it"):
        run(pristine / "hf", tmp_path / "out", **{option: True})
    assert [file.name for file in tmp_path.rglob("*")] == [name, "thesis.txt"]


def test_conversion_to_the_name_of_an_interrupted_one_is_refused(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="the name of an interrupted conversion"):
        run(pristine / "hf", tmp_path / "out.partial")


def test_resume_shows_what_it_checks(pristine: Path, interrupted: Path) -> None:
    stream = io.StringIO()
    convert(pristine / "hf", interrupted, resume=True, progress=stream)
    checked, converted = stream.getvalue().splitlines()
    assert checked.startswith("checked ")
    assert "(100%)" in checked
    assert converted.startswith("converted 568.77 kB of 568.77 kB (100%)")


def test_overwrite_starts_an_interrupted_conversion_over(pristine: Path, interrupted: Path, written: list[str]) -> None:
    run(pristine / "hf", interrupted, overwrite=True)
    assert len(written) == 79


def test_resume_from_another_source_is_refused(pristine: Path, interrupted: Path) -> None:
    with pytest.raises(ConversionError, match="another source"):
        run(pristine / "original", interrupted, resume=True)


def test_resume_from_a_source_that_changed_is_refused(pristine: Path, published: Path, tmp_path: Path) -> None:
    destination = tmp_path / "again"
    partial = partial_directory(destination)
    run(published, destination)
    shutil.rmtree(destination)
    partial.mkdir()
    journal = converter.Journal(partial, converter.identify(converter.open_source(published), quantize=False), {})
    os.utime(published / "model-00000-of-00001.safetensors", (1, 1))
    assert journal.path.exists()
    with pytest.raises(ConversionError, match="another source"):
        run(published, destination, resume=True)


def test_resume_without_anything_interrupted_starts(pristine: Path, tmp_path: Path, written: list[str]) -> None:
    run(pristine / "hf", tmp_path / "out", resume=True)
    assert len(written) == 79


@pytest.mark.parametrize("step", ["commit", "_complete", "rename"])
def test_interruption_of_the_last_steps_can_be_resumed(
    pristine: Path, converted: Path, tmp_path: Path, written: list[str], step: str
) -> None:
    destination = tmp_path / "out"
    real = getattr(converter, step)

    def stop(*arguments) -> None:
        if step != "rename":
            real(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, step, stop)
        with pytest.raises(KeyboardInterrupt):
            run(pristine / "hf", destination)
    assert not destination.exists()
    with pytest.raises(CheckpointError, match="interrupted"):
        read_manifest(partial_directory(destination))
    manifest = run(pristine / "hf", destination, resume=True)
    assert manifest.sha256 == read_manifest(converted).sha256
    assert len(written) == 79, "nothing was written twice"


def test_full_disk_is_named_and_can_be_resumed(pristine: Path, converted: Path, tmp_path: Path) -> None:
    # A limit on file size fails the writing as a full disk does, with another number.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConversionError, match=r"disk full \(File too large\): .*out\.partial: .*--resume"):
            run(pristine / "hf", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert run(pristine / "hf", tmp_path / "out", resume=True).sha256 == read_manifest(converted).sha256


def test_too_little_space_is_named_before_anything_is_written(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match=r"568\.77 kB to write, 1\.00 kB free"):
        run(pristine / "hf", tmp_path / "out")
    assert not written


def test_directory_that_cannot_be_written_is_named(pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConversionError, match=r"cannot go on \(Not a directory\): .*file"):
        run(pristine / "hf", tmp_path / "file" / "out")


def test_crash_between_replacing_and_cleaning_up_is_forgotten(pristine: Path, tmp_path: Path) -> None:
    run(pristine / "hf", tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "out.replaced")
    run(pristine / "hf", tmp_path / "out", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
