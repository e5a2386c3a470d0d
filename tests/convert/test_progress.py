import io
import itertools

import pytest

from convert.progress import Progress, format_bytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is four seconds after the last."""
    seconds = itertools.count(0, 4)
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))


@pytest.mark.usefixtures("clock")
def test_terminal_gets_one_rewritten_line() -> None:
    stream = Terminal()
    with Progress("converted", 8_000_000, stream) as progress:
        for _ in range(4):
            progress.add(2_000_000)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.count("\r") == 5
    assert "converted 2.00 MB of 8.00 MB (25%), 250.00 kB/s" in text


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("stream", "end"), [(Terminal(), "\n"), (io.StringIO(), "")])
def test_message_of_an_error_starts_a_line(stream: io.StringIO, end: str) -> None:
    def stop() -> None:
        with Progress("converted", 8_000_000, stream) as progress:
            progress.add(2_000_000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert stream.getvalue().endswith(end)
    assert stream.getvalue().count("\n") == len(end)


@pytest.mark.usefixtures("clock")
def test_file_gets_a_plain_line_now_and_then() -> None:
    stream = io.StringIO()
    with Progress("verified", 8_000_000, stream) as progress:
        for _ in range(4):
            progress.add(2_000_000)
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 2


@pytest.mark.usefixtures("clock")
def test_bytes_of_an_earlier_run_do_not_count_for_the_rate() -> None:
    stream = io.StringIO()
    with Progress("converted", 10_000_000, stream) as progress:
        progress.skip(6_000_000)
    assert stream.getvalue() == "converted 6.00 MB of 10.00 MB (60%), 0 bytes/s\n"


def test_without_a_stream_it_only_counts() -> None:
    with Progress("converted", 10, None) as progress:
        progress.add(10)
    assert progress.done == 10


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.50 kB"), (13_761_264_768, "13.76 GB")]
)
def test_units(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
