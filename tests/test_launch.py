"""The command line from end to end, in processes of its own: train, be interrupted, resume, evaluate."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from tests.launching import ROOT, launch
from tests.tiny import QUICK

SMALL = ("--config.model.hidden_size=4", "--config.train.batch_size=8", "--config.train.eval_every=50")


def command(*arguments):
    return [sys.executable, str(ROOT / "launch.py"), *arguments]


@pytest.fixture
def environment():
    return {name: value for name, value in os.environ.items() if name != "SEQMNIST_DATA_DIR"}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_train_interrupt_resume_evaluate(tmp_path, environment, number, code):
    workdir = tmp_path / "run"
    base = ["--config", str(ROOT / "configs" / "row_lstm.py"), f"--workdir={workdir}", *SMALL]
    slow = ["--config.train.steps=1000000", "--config.runtime.dispatch_seconds=0.05"]
    process = subprocess.Popen(
        command(*base, *slow),
        cwd=tmp_path,
        env={**environment, **QUICK},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    stopped = int(re.search(r"Stopped at step (\d+)", errors)[1])
    assert "Traceback" not in errors
    # The command that it prints, with an end.
    _, program, *go_on = shlex.split(re.search(r"To go on:\n  (.*)", errors)[1])
    assert program == str(ROOT / "launch.py")
    done = launch([*go_on, f"--config.train.steps={stopped + 10}"], tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert f"Resuming at step {stopped}" in done.stdout
    assert "NOT on MNIST" in done.stdout
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == stopped + 10

    done = launch(["--mode=evaluate", f"--workdir={workdir}", "--json"], tmp_path, environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["accuracy"], result["loss"]) == (summary["test_accuracy"], summary["test_loss"])
    assert result["examples"] == 500


def test_without_a_workdir_each_run_gets_its_own(tmp_path, environment):
    arguments = ["--config", str(ROOT / "configs" / "row_lstm.py"), *SMALL, "--config.train.steps=2"]
    done = launch(arguments, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "row_lstm").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}", folder.name)
    assert f"Training in {folder.relative_to(tmp_path)}" in done.stdout
    lines = done.stdout[done.stdout.index("test accuracy") :].splitlines()[:10]
    assert [line.split("  ")[0] for line in lines] == [
        "test accuracy",
        "over images",
        "test images",
        "test loss",
        "checkpoint",
        "last checkpoint",
        "validation accuracy",
        "training",
        "compiling",
        "device",
    ]
    assert done.stdout.startswith("row_lstm: LSTM 4, rmsprop 0.02, seed 0, 2 steps of 8 (0.004 epochs)\n")
