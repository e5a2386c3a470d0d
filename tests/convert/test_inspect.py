import dataclasses
import json
from pathlib import Path

import pytest

from convert.inspect import _report, cache_bytes, inspect
from gptoss_jax.config import ModelConfig, gpt_oss_20b, gpt_oss_120b
from gptoss_jax.errors import CheckpointError
from tests.tiny import TINY


@pytest.mark.parametrize(("config", "bytes_per_token"), [(gpt_oss_20b(), 24_576), (gpt_oss_120b(), 36_864)])
def test_cache_is_the_published_bytes_a_token_and_a_ring(config: ModelConfig, bytes_per_token: int) -> None:
    # A sliding layer's ring: 11 pages of 64 slots hold the window of 128 and a chunk of 512.
    expected = {length: bytes_per_token * (length + 11 * 64) for length in (4096, 32768, 131072)}
    assert cache_bytes(config) == expected
    # Of 8192: 131 pages, where the context is that long; in a shorter one, all of it.
    widest = {length: bytes_per_token * (length + min(length, 131 * 64)) for length in (4096, 32768, 131072)}
    assert cache_bytes(config, chunk=8192) == widest


def test_says_for_which_chunk_its_cache_is() -> None:
    report = _report("here", "published", gpt_oss_20b(), ())
    assert (report.cache_chunk, report.hopper_cache_chunk) == (512, 8192)
    assert report.hopper_cache_bytes == cache_bytes(report.config, chunk=8192)
    found = report.to_json()
    assert found["cache_bytes"] == report.cache_bytes
    assert [found["cache_chunk"], found["hopper_cache_chunk"]] == [512, 8192]
    text = str(report)
    assert "3.24 GB for 131,072 tokens, read 512 at a time (a CPU)" in text
    assert "3.43 GB for 131,072 tokens, read 8192 at a time (a Hopper GPU)" in text
    assert "takes up to 188.74 MB more in all" in text


def test_contexts_end_with_the_models() -> None:
    assert list(cache_bytes(dataclasses.replace(TINY, max_context=40_000))) == [4096, 32768]
    assert list(cache_bytes(dataclasses.replace(TINY, max_context=100))) == [100]


def test_figures_of_20b() -> None:
    report = _report("here", "published", gpt_oss_20b(), ())
    assert report.num_parameters == 20_914_757_184
    assert report.num_bytes == 13_761_264_768
    assert report.bytes_by_dtype == {
        "bfloat16": 3_608_919_168,
        "FP4 blocks": 9_555_148_800,
        "E8M0 scales": 597_196_800,
    }
    experts = next(group for group in report.groups if group.name == "experts")
    assert experts.num_parameters == 19_110_297_600 + 24 * 32 * (5760 + 2880)
    assert sum(group.num_parameters for group in report.groups) == report.num_parameters
    assert sum(group.num_bytes for group in report.groups) == report.num_bytes


def test_what_fits_where() -> None:
    small, large = (_report("here", "published", config, ()) for config in (gpt_oss_20b(), gpt_oss_120b()))
    # 16 GB less a tenth leaves 638.7 MB beside 20b; a sequence of 4096 takes 118.0 MB, one of 131072 3.2 GB.
    assert [small.sequences(16, context) for context in (4096, 131072)] == [5, 0]
    assert [large.sequences(memory, 131072) for memory in (48, 80, 141)] == [-1, 1, 12]
    assert "weights do not fit" in str(large)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_both_sides_say_the_same(pristine: Path, converted: Path, layout: str) -> None:
    before, after = inspect(pristine / layout), inspect(converted)
    assert before.config == after.config == TINY
    assert before.groups == after.groups
    assert before.bytes_by_dtype == after.bytes_by_dtype
    assert before.num_bytes == 568_768


def test_dequantized_checkpoint_has_its_own_bytes(pristine: Path) -> None:
    report = inspect(pristine / "bf16")
    assert report.bytes_by_dtype == {"bfloat16": 2 * report.num_parameters}


def test_report_can_be_read_by_programs(converted: Path) -> None:
    report = json.loads(json.dumps(inspect(converted).to_json()))
    assert report["num_parameters"] == 825_824
    assert ModelConfig.from_json(report["config"]) == TINY
    assert {"memory_gb": 80, "context": 4096, "sequences": 118_770} in report["fits"]


def test_report_reads_as_tables(converted: Path) -> None:
    text = str(inspect(converted))
    assert "parameters 825,824, active for one token 440,224" in text
    assert "bytes 568,768: bfloat16 177.09 kB" in text
    assert "converted from 2 files: model-00000-of-00001.safetensors, " in text
    assert "cache of one sequence:\n" in text


def test_hub_is_not_downloaded_to_be_inspected() -> None:
    with pytest.raises(CheckpointError, match=r"hf://openai/gpt-oss-20b: run gptoss-jax convert"):
        inspect("hf://openai/gpt-oss-20b")


def test_unfinished_conversion_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in ("out", "out.partial"):
        with pytest.raises(CheckpointError, match="interrupted"):
            inspect(tmp_path / name)
