"""SIGINT and SIGTERM: a run that is asked to stop saves first, and doesn't keep who asked waiting."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

# Schedulers commonly kill what is still there after thirty seconds, people sooner.
GRACE_SECONDS = 8.0
ASKED = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"


class StopOnSignal:
    """Answers "should the run stop?", as a context manager.

    The first SIGINT or SIGTERM makes it yes. A second one, or `GRACE_SECONDS` without an end, ends the
    process at once, whatever it is doing: a thread waits for signals, because Python's own handlers
    wait for the end of what runs outside Python, such as a compilation. What was saved before stays whole.

    Attributes:
      number: of the signal that came; 0 before.
    """

    def __init__(self, go_on: str = "", *, by_hand: bool = True) -> None:
        """Says `go_on`, how to go on, where it ends the process; not by hand, only SIGTERM counts, and only once."""
        self._go_on = go_on
        self._by_hand = by_hand
        self.number = 0

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

    def __enter__(self) -> "StopOnSignal":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # Without a handler in Python the signal would end the process; the thread does the rest.
        self._old_handlers = {
            number: signal.signal(number, _nothing) for number in (ASKED if self._by_hand else ASKED[1:])
        }
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._writer)  # which ends the thread

    def _watch(self) -> None:
        try:
            self._wait_for_two()
        finally:
            os.close(self._reader)

    def _wait_for_two(self) -> None:
        deadline: float | None = None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], left)[0]:
                self._leave(f"It did not come to an end within {GRACE_SECONDS:g} s")
            numbers = os.read(self._reader, 64)
            if not numbers:
                return
            for number in filter(self._old_handlers.__contains__, numbers):
                if not self.number:
                    self.number = number
                    deadline = time.monotonic() + GRACE_SECONDS
                    with contextlib.suppress(OSError):
                        print("Stopping after this dispatch; once more to stop at once.", file=sys.stderr, flush=True)
                elif self._by_hand:
                    self._leave("Asked twice")

    def _leave(self, why: str) -> None:
        with contextlib.suppress(OSError):
            if sys.stdout.isatty():
                print(SHOW_CURSOR, end="", flush=True)  # a live display may have hidden it
            told = f"{why}: stopped at once. The last checkpoint is whole.{self._go_on}"
            print(told, file=sys.stderr, flush=True)
        os._exit(128 + self.number)  # as a shell reports a process that the signal ended


def _nothing(number: int, frame: FrameType | None) -> None:
    """Leaves a signal to the thread."""
