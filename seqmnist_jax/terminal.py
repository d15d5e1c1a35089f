"""What a user sees while a run goes on: lines, and under them a live bar where there is a terminal."""

from collections.abc import Sequence
from types import TracebackType

import rich.console
import rich.progress


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class Terminal:
    """Says lines and shows how far a run is; as a context manager.

    On a terminal a bar stays below the lines; elsewhere (a pipe, a file) there are lines
    only. A quiet one says nothing.
    """

    def __init__(self, total: int, *, quiet: bool = False, console: rich.console.Console | None = None):
        """A terminal for a run of `total` steps, on standard output unless another console is given."""
        self._quiet = quiet
        self._console = console or rich.console.Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._progress: rich.progress.Progress | None = None
        if self._console.is_terminal and not quiet:
            self._progress = rich.progress.Progress(
                rich.progress.TextColumn("step"),
                rich.progress.MofNCompleteColumn(),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TaskProgressColumn(),
                rich.progress.TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task("steps", total=total)

    def say(self, line: str) -> None:
        """Shows a line, at once."""
        if not self._quiet:
            self._console.print(line)
            self._console.file.flush()

    def tick(self, step: int) -> None:
        """Moves the bar to a step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def __enter__(self) -> "Terminal":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
