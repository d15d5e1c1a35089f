"""What a user sees while a run goes on: lines, and under them a live display where there is a terminal."""

from collections.abc import Sequence

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from seqmnist_jax.cli.output import lose
from seqmnist_jax.training.clock import Status, as_time

# Of a curve that is drawn in one line: the heights of its points, and the most of them.
BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-:=+*#"
LONGEST_CURVE = 40


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """A curve in one line, from its least value to its largest; of more values than fit, the last of each group."""
    count = min(width, len(values))
    if count < 1:
        return ""
    shown = [values[(place + 1) * len(values) // count - 1] for place in range(count)]
    least, largest = min(shown), max(shown)
    scale = (len(blocks) - 1) / ((largest - least) or 1.0)
    return "".join(blocks[round((value - least) * scale)] for value in shown)


class Terminal:
    """Says lines and shows where a run stands; as a context manager.

    On a terminal a display of a few lines stays below what is said; elsewhere (a pipe, a file) there are lines
    only. A quiet one says nothing.
    """

    def __init__(self, *, quiet: bool = False, console: rich.console.Console | None = None):
        """A terminal on standard output unless another console is given."""
        self._quiet = quiet
        self._console = console or rich.console.Console(highlight=False, markup=False, emoji=False)
        self._status: Status | None = None
        self._live: rich.live.Live | None = None
        if self._console.is_terminal and not quiet:
            self._live = rich.live.Live(get_renderable=self._drawn, console=self._console, transient=True)

    def say(self, line: str) -> None:
        """Shows a line, at once; on a terminal broken between words where that ends. Where it can't, it is given up."""
        if self._quiet:
            return
        try:
            if self._console.is_terminal:
                self._console.print(line)
            else:  # not by the console, which ends the process where the reader has left
                print(line, file=self._console.file, flush=True)
        except OSError as e:
            self._quiet = True
            lose(e)

    def show(self, status: Status) -> None:
        """Shows where the run stands from now on."""
        self._status = status

    def _drawn(self) -> rich.console.RenderableType:
        return rich.text.Text() if self._status is None else self._lines(self._status)

    def _lines(self, now: Status) -> rich.console.RenderableType:
        """Three lines: how far and how fast, the training scores, what was measured besides."""
        bar = rich.table.Table.grid(padding=(0, 1), expand=True)
        for _ in range(5):
            bar.add_column(no_wrap=True)
        bar.columns[1].ratio = 1
        bar.add_row(
            f"step {now.step:,}/{now.total:,}",
            rich.progress_bar.ProgressBar(now.total, now.step),
            f"{now.step / now.total:.0%}",
            f"{now.rate:.1f} steps/s" if now.rate else "",
            "" if now.seconds_left is None else f"{as_time(now.seconds_left)} left",
        )
        least, largest = now.learning_rates
        rates = f"{least:.4g}" if least == largest else f"{least:.4g} to {largest:.4g}"
        splits = [name.removesuffix("/loss") for name in now.scores if name.endswith("/loss")]
        wide = max(map(len, ["train", *splits]))
        first = "train".ljust(wide) if splits else "nothing measured yet"
        lines = [_line(first, *self._scores(now, "train"), ("learning rate", rates))]
        if now.runs > 1:
            lines[0].append(f"  {now.runs} runs", "dim")
        for split in splits:
            if split != "train":
                lines.append(_line(split.ljust(wide), *self._scores(now, split)))
        if now.validated:
            # Of equal ones the first.
            step, best = max(now.validated, key=lambda one: one[1])
            lines[-1].append_text(_line("", ("best", f"{best:.2%}"), ("at step", f"{step:,}")))
            width = min(LONGEST_CURVE, self._console.width - lines[-1].cell_len - 2)
            blocks = BLOCKS if self._console.encoding.startswith("utf") else ASCII_BLOCKS
            lines[-1].append("  " + sparkline([accuracy for _, accuracy in now.validated], width, blocks), "green")
        return rich.console.Group(bar, *lines)

    @staticmethod
    def _scores(now: Status, split: str) -> list[tuple[str, str]]:
        if f"{split}/loss" not in now.scores:
            return []
        return [("loss", f"{now.scores[f'{split}/loss']:.4f}"), ("accuracy", f"{now.scores[f'{split}/accuracy']:.2%}")]

    def __enter__(self) -> "Terminal":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._live is not None:
            self._live.stop()


def _line(name: str, *values: tuple[str, str]) -> rich.text.Text:
    """A name and what is to be said of it, as labels and values, cut off where the terminal ends."""
    text = rich.text.Text(name, no_wrap=True, overflow="ellipsis")
    for label, value in values:
        text.append(f"  {label} ", "dim").append(value, "bold")
    return text
