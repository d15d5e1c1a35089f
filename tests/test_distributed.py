"""Two processes as one program, on loopback: the result of one, one writer, death and resumption, bad requests."""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import row_lstm
from seqmnist_jax.devices import processes
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.state import restore_state
from seqmnist_jax.training.train import train
from seqmnist_jax.workdir.checkpoints import Checkpoints
from tests.launching import ROOT, launch
from tests.tiny import QUICK

CHANGES = {
    "data.source": "embedded",
    "model.hidden_size": 8,
    "model.norm": "batch",
    "optimizer.learning_rate": 0.002,
    "train.batch_size": 16,
    "train.steps": 60,
    "train.eval_every": 20,
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(workdir, port, index, **changes):
    settings = {**CHANGES, "runtime.distributed": f"127.0.0.1:{port},2,{index}", **changes}
    return subprocess.Popen(
        [
            *(sys.executable, "launch.py", "--config", "configs/row_lstm.py", f"--workdir={workdir}"),
            *(f"--config.{name}={value}" for name, value in settings.items()),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **QUICK},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_pair(workdir, **changes):
    port = free_port()
    pair = [start(workdir, port, index, **changes) for index in (0, 1)]
    told = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    return [out for out, _ in told]


def params_of(workdir, run):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return jax.tree.leaves(restore_state(checkpoints, checkpoints.last_step(), run.learner.template).params)


def assert_same(pair, alone, run):
    for x, y in zip(params_of(pair, run), params_of(alone, run), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(np.asarray(y)).max())
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (pair, alone)]
    assert summaries[0]["test_loss"] == pytest.approx(summaries[1]["test_loss"], rel=1e-4)
    assert [summary["processes"] for summary in summaries] == [2, 1]


@pytest.fixture
def alone(tmp_path, quick_compiler):
    """The run by one process: the run and its folder."""
    config = row_lstm.get_config()
    config.update_from_flattened_dict(CHANGES)
    run = build_run(config)
    train(run, tmp_path / "alone", watch=QUIET)
    return run, tmp_path / "alone"


@pytest.mark.slow
def test_two_processes_are_one_run(alone, tmp_path):
    run, folder = alone
    first, second = train_pair(tmp_path / "pair")
    assert_same(tmp_path / "pair", folder, run)
    assert "test accuracy" in first
    assert "step" not in second
    # One wrote.
    events = [json.loads(line) for line in (tmp_path / "pair" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["split"] == "train"] == [20, 40, 60]
    assert len(list((tmp_path / "pair").glob("events.out.tfevents*"))) == 1


@pytest.mark.slow
def test_the_death_of_one_ends_the_other_and_both_resume(alone, tmp_path):
    run, folder = alone
    port, pair = free_port(), tmp_path / "pair"
    # Long enough to be killed on the way.
    slow = {"train.steps": 100_000, "runtime.dispatch_seconds": 0.2}
    first, second = (start(pair, port, index, **slow) for index in (0, 1))
    while not (pair / "checkpoints" / "40").is_dir():
        assert first.poll() is None
        time.sleep(0.02)
    second.kill()
    killed = time.monotonic()
    _, complaint = first.communicate(timeout=90)
    assert time.monotonic() - killed < 60
    assert first.returncode != 0
    assert "Another process of this run has failed" in complaint, complaint[:3000]
    assert "Task 1" in complaint or "task 1" in complaint
    # A run of more steps than asked for now: what is beyond them is another test's business.
    for path in (pair / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 60:
            pytest.skip("the machine was too fast for the kill")
    train_pair(pair)
    assert_same(pair, folder, run)


@pytest.mark.slow
def test_a_process_that_never_comes(tmp_path):
    process = start(tmp_path / "run", free_port(), 0)
    began = time.monotonic()
    _, complaint = process.communicate(timeout=150)
    assert time.monotonic() - began < 120
    assert process.returncode != 0
    assert "Waiting for all processes" in complaint
    assert "at most 60 s" in complaint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spec", ["host", "host:1", "host:1,2", "host:1,2,2", "host,2,0", "host:1,0,0", "auto,2,1"])
def test_impossible_specs(spec):
    with pytest.raises(UsageError, match=r"runtime\.distributed is"):
        processes.initialize(spec)


def test_a_process_alone_agrees_with_itself():
    processes.initialize("")
    assert processes.is_main()
    assert processes.agree(7) == 7
    assert processes.any_of(True)
    processes.wait("nobody")


def test_it_needs_a_folder_that_all_see():
    done = launch(["--config", str(ROOT / "configs" / "row_lstm.py"), "--config.runtime.distributed=auto"], ROOT)
    assert done.returncode == 2
    assert "needs --workdir" in done.stderr
