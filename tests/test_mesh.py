"""Several devices: the same results on 1, 2 and 4, replicas apart, bad meshes. Devices are made of CPU cores."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from seqmnist_jax.devices.mesh import largest_divisor, make_mesh
from seqmnist_jax.errors import UsageError
from tests.tiny import QUICK_FLAG

ROOT = Path(__file__).parent.parent
DEVICES = 4

# Trains in a process with several devices, and leaves the final parameters and metrics.
SCRIPT = """
import json, sys
from pathlib import Path
import jax, numpy as np
from configs import row_lstm
from seqmnist_jax.training import plan, sweep
from seqmnist_jax.workdir.checkpoints import Checkpoints
from seqmnist_jax.training.replicas import QUIET, Job
from seqmnist_jax.training.state import restore_state
from seqmnist_jax.training.train import train_replicas

jax.config.update("jax_compilation_cache_dir", None)
jobs = json.loads(sys.argv[1])
assert len(jax.devices()) == int(sys.argv[2])
for job in jobs:
    config = row_lstm.get_config()
    config.update_from_flattened_dict({"data.source": "embedded", "model.hidden_size": 8, "train.batch_size": 16,
        "model.dense_init": "glorot_uniform", "train.steps": 10, "train.eval_every": 10, **job["changes"]})
    points = plan.build_points(config, {"seed": tuple(job["seeds"])})
    folders = [Path(job["folder"]) / str(seed) for seed in job["seeds"]]
    train_replicas([Job(m.run, folder) for m, folder in zip(points, folders)], QUIET)
    for point, folder in zip(points, folders):
        with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
            params = restore_state(checkpoints, 10, point.run.learner.template).params
        np.savez(folder / "params.npz", *jax.tree.leaves(params))
"""


def train_jobs(jobs, devices=DEVICES):
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_FLAG}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs), str(devices)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def params_of(folder, seed=1):
    with np.load(folder / str(seed) / "params.npz") as saved:
        return [saved[name] for name in saved.files]


def summary_of(folder, seed=1):
    return json.loads((folder / str(seed) / "summary.json").read_text())


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


# All that a batch's division could change: its statistics, masks, lengths and parts.
HARD = {
    "model.norm": "batch",
    "model.dropout.output_keep": 0.8,
    "model.dropout.input_keep": 0.9,
    "data.min_length": 10,
    "optimizer.learning_rate": 0.002,
}


def job(folder, seeds, mesh, **changes):
    return {"folder": str(folder), "seeds": seeds, "changes": {"runtime.mesh": mesh, **changes}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    easy, parts = {"optimizer.learning_rate": 0.002}, {**HARD, "train.accumulate": 2}
    train_jobs(
        [
            job(folder / "one", [1], "replica:1,data:1", **easy),
            job(folder / "replicas_four", [1, 2, 3, 4], "auto", **easy),
            job(folder / "replicas_both", [1, 2, 3, 4], "replica:2,data:2", **easy),
            job(folder / "parts_one", [1], "replica:1,data:1", **parts),
            job(folder / "parts_four", [1], "replica:1,data:4", **parts),
        ]
    )
    return folder


@pytest.mark.parametrize("name", ["replicas_four", "replicas_both"])
@pytest.mark.sampled(1)
def test_same_batch_same_result(trained, name):
    assert_close(params_of(trained / name), params_of(trained / "one"))
    assert summary_of(trained / name)["test_loss"] == pytest.approx(summary_of(trained / "one")["test_loss"], rel=1e-5)


def test_statistics_masks_and_lengths_are_those_of_each_whole_part(trained):
    assert_close(params_of(trained / "parts_four"), params_of(trained / "parts_one"))


@pytest.mark.slow
def test_statistics_masks_and_lengths_are_those_of_the_whole_batch(tmp_path):
    train_jobs([job(tmp_path / "one", [1], "replica:1,data:1", **HARD), job(tmp_path / "four", [1], "auto", **HARD)])
    assert_close(params_of(tmp_path / "four"), params_of(tmp_path / "one"))


def test_replicas_on_devices_of_their_own(trained):
    """One on each of four, and two on each pair of two: the first of them is what it is on one device alone."""
    names = ("replicas_four", "replicas_both")
    for seed in (1, 2, 3, 4):
        assert_close(*(params_of(trained / name, seed) for name in names))
    events = [(trained / name / "3" / "metrics.jsonl").read_text().splitlines() for name in names]
    for four, both in zip(*events, strict=True):
        assert json.loads(four)["loss"] == pytest.approx(json.loads(both)["loss"], rel=1e-5)


def test_divisors():
    assert largest_divisor(6, 4) == 3
    assert largest_divisor(8, 4) == 4
    assert largest_divisor(7, 4) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("2x2", "expected 'auto' or 'replica:R,data:D'"),
        ("replica:0,data:1", "expected 'auto'"),
        ("replica:1,data:00", "expected 'auto'"),
        (f"replica:{len(jax.devices()) + 1},data:1", r"devices, but there are"),
    ],
)
def test_impossible_meshes(spec, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(spec, 4, 16)


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def test_each_process_has_work(monkeypatch):
    devices = [Device(index, index // 2) for index in range(6)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert make_mesh("auto", 1, 12).size == 6
    for spec, replicas, batch in (("auto", 1, 32), ("auto", 1, 7), ("replica:2,data:2", 2, 2), ("auto", 4, 1)):
        with pytest.raises(UsageError, match=r"devices, which [12] of the 3 processes have; expected"):
            make_mesh(spec, replicas, batch)


def test_a_mesh_must_divide(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 8)
    with pytest.raises(UsageError, match="4 replicas are no multiple of 3"):
        make_mesh("replica:3,data:1", 4, 16)
    with pytest.raises(UsageError, match=r"batches of 16 .* no multiple of 3"):
        make_mesh("replica:1,data:3", 4, 16)
