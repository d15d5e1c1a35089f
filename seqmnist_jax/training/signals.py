"""Signals: a run that is asked to stop saves first, and doesn't keep who asked waiting."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence

# Schedulers commonly kill what is still there after thirty seconds, people sooner.
GRACE_SECONDS = 8.0
# What asks a process to stop that was started by hand: the last where its terminal is closed.
BY_HAND = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What asks a job: the second is submitit's, some time before the job's time is over or another job takes its place.
# Ctrl-C is for who submitted it.
OF_A_JOB = (signal.SIGTERM, signal.SIGUSR2)
SHOW_CURSOR = "\x1b[?25h"


class StopOnSignal:
    """Answers "should the run stop?", as a context manager.

    The first signal makes it yes. A SIGINT or SIGTERM after it, to a process that was started by hand, or
    `GRACE_SECONDS` without an end, ends the process at once, whatever it is doing: a thread waits for signals,
    because Python's own handlers wait for the end of what runs outside Python, such as a compilation. What was
    saved before stays whole. Under nohup a closed terminal does not count.

    Attributes:
      number: of the signal that came; 0 before.
    """

    def __init__(self, go_on: str = "", asked_by: Sequence[signal.Signals] = BY_HAND) -> None:
        """Answers these signals; says `go_on`, how to go on, where it ends the process."""
        self._go_on = go_on
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._asked_by = [number for number in asked_by if not (number == signal.SIGHUP and is_nohup)]
        self._by_hand = asked_by == BY_HAND
        self.number = 0

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

    def __enter__(self) -> "StopOnSignal":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # Without a handler in Python the signal would end the process; the thread does the rest.
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in self._asked_by}
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
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
                elif self._by_hand and number != signal.SIGHUP:  # a closed terminal may send several
                    self._leave("Asked twice")

    def _leave(self, why: str) -> None:
        with contextlib.suppress(OSError):
            if sys.stdout.isatty():
                print(SHOW_CURSOR, end="", flush=True)  # a live display may have hidden it
            told = f"{why}: stopped at once. The last checkpoint is whole.{self._go_on}"
            print(told, file=sys.stderr, flush=True)
        os._exit(128 + self.number)  # as a shell reports a process that the signal ended
