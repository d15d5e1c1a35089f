"""Lines and the live display."""

import io

import pytest
import rich.console
import rich.text

from seqmnist_jax.cli import output
from seqmnist_jax.cli.terminal import ASCII_BLOCKS, BLOCKS, Terminal, sparkline
from seqmnist_jax.training.clock import Clock, Progress, Status

STATUS = Status(
    step=1500,
    total=3000,
    rate=1164.4,
    seconds_left=65.0,
    learning_rates=(0.02, 0.02),
    scores={"train/loss": 0.25, "train/accuracy": 0.925, "validation/loss": 0.5, "validation/accuracy": 0.9},
    validated=((500, 0.5), (1000, 0.96), (1500, 0.9)),
    runs=1,
)


def shown(*, is_terminal, quiet=False, width=80, status=STATUS, encoding="utf-8"):
    """What a terminal writes for a line, where a run stands, and a long line."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = rich.console.Console(
        file=file, force_terminal=is_terminal, width=width, highlight=False, markup=False, soft_wrap=True
    )
    with Terminal(quiet=quiet, console=console) as terminal:
        terminal.say("first [bold] line")
        terminal.show(status)
        terminal.say("x" * 200)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def drawn(text):
    """The lines of the last display in what a terminal was sent, as they look."""
    return rich.text.Text.from_ansi(text[text.rindex("step 1,5") :]).plain.splitlines()


def test_a_pipe_gets_plain_whole_lines():
    assert shown(is_terminal=False) == "first [bold] line\n" + "x" * 200 + "\n"


def test_lines_break_between_words_where_a_terminal_ends():
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=True, width=12, highlight=False)
    Terminal(console=console).say("wide words go down")
    lines = rich.text.Text.from_ansi(file.getvalue()).plain.splitlines()
    assert [line.rstrip() for line in lines] == ["wide words", "go down"]


def test_what_a_mode_prints_breaks_between_words_on_a_terminal_alone(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "12")
    text = "wide words go down\n\n  indented  ones  too\n" + "x" * 20
    screen, pipe = Screen(), io.StringIO()
    output.print_text(text, screen)
    output.print_text(text, pipe)
    assert screen.getvalue().splitlines() == [
        *("wide words", "go down", ""),
        *("  indented", "ones  too", "x" * 20),
    ]
    assert pipe.getvalue() == text + "\n"


def test_commands_are_never_broken(monkeypatch, capsys):
    monkeypatch.setattr(output, "print_text", lambda text, file: print(f"<{text}>", file=file))
    output.show(output.Output({"a": 1}, "a text", "a command"), as_json=False)
    output.show(output.Output({"a": 1}, "a text", "a command"), as_json=True)
    assert capsys.readouterr().out == '<a text>\na command\n{\n  "a": 1\n}\n'


def test_a_terminal_gets_a_display_under_its_lines():
    text = shown(is_terminal=True)
    assert "first [bold] line" in text
    lines = drawn(text)
    assert lines[0].startswith("step 1,500/3,000 ")
    assert lines[0].endswith(" 50% 1164.4 steps/s 0:01:05 left")
    assert lines[1] == "train       loss 0.2500  accuracy 92.50%  learning rate 0.02"
    assert lines[2].startswith("validation  loss 0.5000  accuracy 90.00%  best 96.00%  at step 1,000  ▁█")


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_a_display_is_three_lines_however_wide_the_terminal(width):
    many = tuple((step, step / 3000) for step in range(3000))
    lines = drawn(shown(is_terminal=True, width=width, status=STATUS._replace(validated=many, runs=12)))
    assert [line.split()[0] for line in lines[:3]] == ["step", "train", "validation"]
    assert all(len(line) <= width for line in lines)


def test_a_display_before_anything_is_measured():
    lines = drawn(shown(is_terminal=True, status=STATUS._replace(rate=0.0, seconds_left=None, scores={}, validated=())))
    assert "steps/s" not in lines[0]
    assert lines[1].rstrip() == "nothing measured yet  learning rate 0.02"


def test_runs_of_different_rates():
    lines = drawn(shown(is_terminal=True, status=STATUS._replace(learning_rates=(0.001, 0.004), runs=8)))
    assert lines[1].endswith("learning rate 0.001 to 0.004  8 runs")


def test_a_terminal_without_unicode_gets_another_curve():
    lines = drawn(shown(is_terminal=True, encoding="ascii"))
    assert lines[2].rstrip().endswith(f"at step 1,000  {ASCII_BLOCKS[0]}{ASCII_BLOCKS[-1]}{ASCII_BLOCKS[6]}")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quiet_says_nothing(is_terminal):
    assert shown(is_terminal=is_terminal, quiet=True) == ""


def test_an_error_takes_the_display_away():
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=True, width=80)
    terminal = Terminal(console=console)
    terminal.show(STATUS)
    with pytest.raises(RuntimeError), terminal:
        raise RuntimeError
    assert "\x1b[?25h" in file.getvalue(), "the cursor is shown again"


def test_a_sparkline_is_scaled_and_fits():
    assert sparkline([], 5) == sparkline([1.0], 0) == sparkline([1.0], -3) == ""
    assert sparkline([0.3, 0.3], 5) == BLOCKS[0] * 2
    assert sparkline([0.0, 0.5, 1.0], 5) == BLOCKS[0] + BLOCKS[4] + BLOCKS[7]
    assert sparkline(range(800), 8) == BLOCKS


def test_progress_remembers_what_was_measured():
    progress = Progress(10, 30, Clock(), validated=[(10, 0.25)])
    assert progress.status([0.1])[:4] == (10, 30, 0.0, None)
    progress.advance(20, 2.0)
    progress.line({"train/loss": 1.0, "train/accuracy": 0.5})
    progress.line({"train/loss": 0.5, "train/accuracy": 0.75, "validation/loss": 0.5, "validation/accuracy": 0.5})
    status = progress.status([0.1, 0.3, 0.2])
    assert (status.step, status.rate, status.learning_rates) == (20, 5.0, (0.1, 0.3))
    assert status.validated == ((10, 0.25), (20, 0.5))
    assert status.scores["train/loss"] == 0.5
    assert status.seconds_left >= 0.0
