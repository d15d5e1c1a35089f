"""One owner of a folder; and how a process that is asked to stop comes to its end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from seqmnist_jax.training import signals
from seqmnist_jax.workdir.lock import InUse, owned

HOLD = """
import sys, time
from pathlib import Path
from seqmnist_jax.workdir.lock import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""
STOP = """
import signal, sys, time
from seqmnist_jax.training import signals
signals.GRACE_SECONDS = 0.5
with signals.StopOnSignal({given}) as stop:
    print("ready", flush=True)
    {work}
sys.exit(128 + stop.number)
"""


def start(code, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    return process


def test_a_second_owner_is_told_of_the_first_until_it_dies(tmp_path):
    process = start(HOLD, str(tmp_path))
    try:
        with pytest.raises(InUse, match=rf"in use by process {process.pid} on .*, since 20\d\d"), owned(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with owned(tmp_path):
        pass


def test_an_owner_may_leave_and_come_back(tmp_path):
    for _ in range(2):
        with owned(tmp_path):
            pass


LOOKS_UP = "\n    ".join(["while not stop():", "    time.sleep(0.01)"])


@pytest.mark.parametrize(
    ("number", "given"),
    [
        (signal.SIGINT, ""),
        (signal.SIGTERM, ""),
        (signal.SIGHUP, ""),
        (signal.SIGTERM, "asked_by=signals.OF_A_JOB"),
        (signal.SIGUSR2, "asked_by=signals.OF_A_JOB"),
    ],
)
def test_the_first_signal_is_told_to_who_asks(number, given):
    default = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # the tests may run under nohup
    process = start(default + STOP.format(work=LOOKS_UP, given=given))
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert "Stopping after this dispatch" in errors


def test_what_nohup_ignores_stays_ignored():
    process = start(
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + STOP.format(work=LOOKS_UP, given="")
    )
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Asked twice" not in errors


# Python's own handlers would wait for the end of this, as of a compilation.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'salt', 60_000_000)"


def test_a_second_signal_ends_what_does_not_look_up():
    process = start(STOP.format(work=BUSY, given="").replace("0.5", "30"))
    process.send_signal(signal.SIGTERM)
    assert "Stopping" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert (process.returncode, "Asked twice" in errors) == (128 + signal.SIGTERM, True)


def test_patience_ends(tmp_path):
    process = start(STOP.format(work=BUSY, given=""))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "did not come to an end within 0.5 s" in errors


def test_afterwards_signals_are_as_before():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signals.StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        assert stop()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert stop.number == signal.SIGTERM
