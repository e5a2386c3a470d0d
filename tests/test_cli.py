"""The command line: instant help, one line for a bad input, and what each command prints.

Most tests put a script in the model's place; the last ones run the demo checkpoint.
"""

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from convert.converter import convert
from convert.golden import GoldenTarget
from convert.synthetic import write_checkpoint
from gptoss_jax.cli import main
from gptoss_jax.generation.generate import Token
from gptoss_jax.harmony.encoding import decode, encode
from gptoss_jax.harmony.tokens import STOP_IDS
from tests.scripted import call, final, thought
from tests.test_chat_terminal import Terminal
from tests.tiny import TINY

COMMANDS = ("demo", "convert", "inspect", "verify", "generate", "chat", "bench", "plan")


class StandIn:
    """Takes the place of `load` and `stream`: writes what it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.reply = ""
        self.prompt = ""
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=201088))

    def load(self, path, **placement):
        self.path, self.placement = path, placement
        return self.model

    def stream(self, model, prompt: Sequence[int], sampling, *, max_new_tokens: int) -> Iterator[Token]:
        self.prompt, self.sampling = decode(prompt), sampling
        ids = encode(self.reply, special=True)[:max_new_tokens]
        for index, token in enumerate(ids):
            reason = "stop" if token in STOP_IDS else "length" if index + 1 == max_new_tokens else None
            yield Token(token, -index / 2, (), reason)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr("gptoss_jax.checkpoint.load", stand_in.load)
    monkeypatch.setattr("gptoss_jax.generation.generate.stream", stand_in.stream)
    return stand_in


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
def test_help_is_instant(command: tuple[str, ...]) -> None:
    code = """if True:
        import sys, time
        from gptoss_jax.cli import main
        try:
            main([*sys.argv[1:], "--help"])
        except SystemExit as end:
            assert end.code == 0
        assert not {"jax", "numpy", "openai_harmony"} & set(sys.modules)
        print(time.process_time(), file=sys.stderr)
    """
    answer = python(code, *command)
    assert answer.stdout.startswith(" ".join(("usage: gptoss-jax", *command)))
    assert float(answer.stderr) < 0.5, "seconds of processor time, the interpreter's start included"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("gptoss-jax 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND: gptoss-jax: see gptoss-jax --help"),
        ("sing", "argument COMMAND: invalid choice: 'sing'"),
        ("generate ckpt", "the following arguments are required: --prompt: gptoss-jax generate: see"),
        ("generate ckpt --prompt hi --max-new-tokens -3", "argument --max-new-tokens: -3 is less than 1: "),
        ("generate ckpt --prompt hi --max-new-tokens x", "argument --max-new-tokens: 'x' is no whole number: "),
        ("generate ckpt --prompt hi --temperature warm", "argument --temperature: invalid float value: 'warm': "),
        ("chat ckpt --reasoning hard", "argument --reasoning: invalid choice: 'hard'"),
        ("chat ckpt --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("chat ckpt --seed", "argument --seed: expected one argument: gptoss-jax chat: see gptoss-jax chat --help"),
    ],
)
def test_usage_error_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"gptoss-jax: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate nowhere --prompt hi", "no such directory: nowhere: name a directory that gptoss-jax convert wrote"),
        ("generate nowhere --prompt=", "an empty prompt: --prompt: give some text"),
        ("generate nowhere --prompt hi --temperature -1", "temperature is -1.0: sampling: choose 0 or more"),
        ("generate nowhere --prompt hi --temperature nan", "temperature is nan: "),
        ("generate nowhere --prompt hi --top-p 0", "top_p is 0.0: "),
        ("chat nowhere --seed -1", "seed is -1: "),
        ("chat nowhere --mesh expert", "cannot read 'expert': --mesh: write it as expert=2,tensor=1; axes: data, exp"),
        ("chat nowhere --mesh expert=two", "cannot read 'expert=two': --mesh: "),
        ("chat nowhere --mesh model=2", "cannot read 'model=2': --mesh: "),
        ("chat nowhere --mesh expert=2,expert=2", "cannot read 'expert=2': --mesh: "),
        ("chat nowhere --mesh=", "cannot read '': --mesh: "),
        ("chat nowhere --mesh expert=0", "axis expert has size 0: mesh: "),
        ("chat nowhere --mesh expert=64", "data=1 x expert=64 x tensor=1 needs 64 devices: "),
        ("verify nowhere --mesh expert=2", "no model to place: --mesh, --dtype, --coordinator, --num-processes, --pro"),
        ("verify nowhere --num-processes 2", "no model to place: "),
        ("verify nowhere --process-id 0", "no model to place: "),
        ("verify nowhere --golden --wait nan", "cannot wait nan s: wait: give a number of seconds above 0"),
        ("verify nowhere --golden --wait inf", "cannot wait inf s: "),
        ("verify nowhere --golden --wait 0", "cannot wait 0 s: "),
        ("verify nowhere --golden --wait -1", "cannot wait -1 s: "),
        ("verify nowhere --golden", "no such directory: nowhere: "),
        ("inspect nowhere", "no such folder: nowhere: "),
        ("convert nowhere out", "no such folder: nowhere: "),
    ],
)
def test_bad_input_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"gptoss-jax: {message}")
    assert captured.err.count("\n") == 1


def test_bug_is_a_traceback(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "model", None)
    with pytest.raises(AttributeError):
        main(["generate", "ckpt", "--prompt", "hi"])


def test_reader_that_leaves_is_no_error(random_checkpoint: Path) -> None:
    arguments = [sys.executable, "-m", "gptoss_jax.cli", "inspect", str(random_checkpoint)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_generate_prints_the_answer_and_nothing_else(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.reply = thought("Sum.") + final("Four.")
    assert main(["generate", "ckpt", "--prompt", "2 + 2?", "--reasoning", "low"]) == 0
    assert capsys.readouterr() == ("Four.\n", "")
    assert "Reasoning: low" in stand_in.prompt
    assert stand_in.prompt.endswith("<|start|>user<|message|>2 + 2?<|end|><|start|>assistant")


def test_generate_dims_the_reasoning_on_a_terminal(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    stand_in.reply = thought("Sum.") + final("\x1b]Four.")
    assert main(["generate", "ckpt", "--prompt", "2 + 2?"]) == 0
    assert screen.getvalue() == "\x1b[2mSum.\x1b[0m\n␛]Four.\n"


def test_terminal_is_not_left_dim_after_an_interruption(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments, **options):
        stand_in.reply = thought("Sum.")
        yield from stand_in.stream(*arguments, **options)
        raise KeyboardInterrupt

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("gptoss_jax.generation.generate.stream", interrupted)
    assert main(["generate", "ckpt", "--prompt", "2 + 2?"]) == 130
    assert screen.getvalue() == "\x1b[2mSum.\x1b[0m\ngptoss-jax: interrupted\n"


def test_generate_warns_on_standard_error(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.reply = "<|channel|>final<|message|>Four<|message|>."
    assert main(["generate", "ckpt", "--prompt", "2 + 2?", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr() == (
        "Four\n.\n",
        "[warning] <|message|> inside a message\n[raw] <|message|>\n[note] out of tokens: the answer is cut off\n",
    )
    stand_in.reply = call("functions.add", "{}")
    assert main(["generate", "ckpt", "--prompt", "2 + 2?"]) == 0
    assert capsys.readouterr() == ("", "[tool call] add {}\n")


def test_generate_raw_continues_the_text_as_it_stands(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.reply = " are blue 🦙<|return|>"
    monkeypatch.setattr("sys.stdin", io.StringIO("<|start|>Roses are red,\nviolets"))
    assert main(["generate", "ckpt", "--raw", "--prompt", "-"]) == 0
    assert capsys.readouterr() == (" are blue 🦙<|return|>\n", "")
    assert stand_in.prompt == "<|start|>Roses are red,\nviolets"
    assert main(["generate", "ckpt", "--raw", "--prompt", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == {"final": " are blue 🦙<|return|>"}


def test_generate_json_is_one_object(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.reply = thought("Sum.") + final("Four.")
    assert main(["generate", "ckpt", "--prompt", "2 + 2?", "--json", "--seed", "7", "--temperature", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert decode(report["prompt_ids"]) == stand_in.prompt
    assert decode(report["ids"]) == stand_in.reply
    assert report["logprobs"] == [-index / 2 for index in range(len(report["ids"]))]
    assert report["text"] == {"analysis": "Sum.", "final": "Four."}
    assert (report["finish_reason"], report["warnings"], report["seed"]) == ("stop", [], 7)
    assert set(report["timings"]) == {"load_s", "first_token_s", "tokens_per_s"}
    assert stand_in.sampling == gptoss_jax.Sampling(temperature=0.0, seed=7)


def test_seed_that_was_drawn_is_told(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.reply = final("Four.")
    assert main(["generate", "ckpt", "--prompt", "hi", "--json", "--max-new-tokens", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seed"] == stand_in.sampling.seed is not None
    assert report["timings"]["tokens_per_s"] is None, "too short for a rate"
    assert report["finish_reason"] == "length"


def test_mesh_and_dtype_reach_the_loader(stand_in: StandIn) -> None:
    stand_in.reply = final("Four.")
    arguments = ["generate", "ckpt", "--prompt", "hi", "--mesh", "tensor=2,expert=2", "--dtype", "float32"]
    assert main(arguments) == 0
    assert stand_in.path == Path("ckpt")
    assert dict(stand_in.placement["mesh"].shape) == {"data": 1, "expert": 2, "tensor": 2}
    assert stand_in.placement["dtype"] == jnp.float32


def test_chat_through_pipes(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.reply = thought("Sum.") + final("Four.")
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 2?\n/quit\n"))
    assert main(["chat", "ckpt", "--instructions", "Be brief.", "--reasoning", "high"]) == 0
    assert capsys.readouterr().out == "[analysis] Sum.\nFour.\n"
    assert "Reasoning: high" in stand_in.prompt
    assert "# Instructions\n\nBe brief." in stand_in.prompt


def test_chat_json_is_an_object_a_line(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.reply = final("Four.")
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 2?"))
    assert main(["chat", "ckpt", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["type"] for event in events] == ["final", "final", "message", "done"]


def test_input_that_is_no_text_is_replaced(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.reply = final("Four.")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8"))
    assert main(["chat", "ckpt"]) == 0
    assert "<|message|>a\ufffdb<|end|>" in stand_in.prompt


def test_model_without_the_vocabulary_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "tiny", TINY)
    convert(tmp_path / "tiny", tmp_path / "out")
    assert main(["generate", str(tmp_path / "out"), "--prompt", "hi"]) == 2
    assert capsys.readouterr().err.startswith("gptoss-jax: a vocabulary of 130, harmony needs 201088: ")
    assert main(["verify", str(tmp_path / "out"), "--golden"]) == 2
    assert "no published log-probabilities for this architecture" in capsys.readouterr().err


def test_mesh_that_does_not_divide_is_refused(random_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(random_checkpoint), "--mesh", "tensor=4"]) == 2
    assert "2 kv heads do not divide over tensor = 4" in capsys.readouterr().err


def test_golden_check_reads_the_model(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo checkpoint stands in for real weights, its own log-probabilities for the published ones."""
    prompt, text = "Roses are red, violets", " are blue, I love you."
    model = gptoss_jax.load(random_checkpoint)
    ids = encode(prompt + text)
    logits = np.asarray(model(np.array([ids], np.int32)), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    first = len(encode(prompt))
    published = [float(logprobs[position - 1, ids[position]]) for position in range(first, len(ids))]

    arguments = ["verify", str(random_checkpoint), "--golden"]
    monkeypatch.setattr("convert.golden.target_for", lambda config: GoldenTarget(prompt, text, tuple(published)))
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "equal the checksums of its manifest" in table
    assert table.endswith("passed\n")

    published[2] /= 2
    monkeypatch.setattr("convert.golden.target_for", lambda config: GoldenTarget(prompt, text, tuple(published)))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out.count("out of tolerance") == 1
    assert captured.err.splitlines()[-1].startswith("gptoss-jax: the log-probabilities are not the published ones: ")


@pytest.mark.slow
def test_generate_from_the_random_checkpoint(random_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(random_checkpoint), "--prompt", "What is 2 + 2?", "--max-new-tokens", "24", "--json"]
    reports = []
    for _ in range(2):
        assert main([*arguments, "--reasoning", "low", "--seed", "5"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report.pop("timings")["tokens_per_s"] > 0
        reports.append(report)
    assert reports[0] == reports[1], "the same seed, the same tokens"
    assert 1 <= len(report["ids"]) == len(report["logprobs"]) <= 24
    assert all(logprob < 0 for logprob in report["logprobs"])
    assert "".join(report["text"].values())
