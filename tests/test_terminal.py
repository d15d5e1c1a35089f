"""Lines and the live bar."""

import io

import pytest
import rich.console

from seqmnist_jax.terminal import Terminal


def shown(*, is_terminal, quiet=False):
    """What a terminal of 10 steps writes for a line, half the steps, and a line."""
    file = io.StringIO()
    console = rich.console.Console(
        file=file, force_terminal=is_terminal, width=80, highlight=False, markup=False, soft_wrap=True
    )
    with Terminal(10, quiet=quiet, console=console) as terminal:
        terminal.say("first [bold] line")
        terminal.tick(5)
        terminal.say("x" * 200)
    return file.getvalue()


def test_a_pipe_gets_plain_whole_lines():
    assert shown(is_terminal=False) == "first [bold] line\n" + "x" * 200 + "\n"


def test_a_terminal_gets_a_bar_under_its_lines():
    text = shown(is_terminal=True)
    assert "first [bold] line" in text
    assert "5/10" in text
    assert "50%" in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quiet_says_nothing(is_terminal):
    assert shown(is_terminal=is_terminal, quiet=True) == ""


def test_an_error_takes_the_bar_away():
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=True, width=80)
    with pytest.raises(RuntimeError), Terminal(10, console=console):
        raise RuntimeError
    assert file.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in file.getvalue(), "the cursor is shown again"
