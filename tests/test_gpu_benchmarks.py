"""What measures a GPU, rehearsed at tiny sizes on whatever device there is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu, gpu_layers
from configs import row_lstm
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import train

ROOT = Path(__file__).parent.parent
DONE = gpu.Done(0, 5.0, "")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    layers = ("gru:8:32", "lstm:8:16", "lem:8:16", "lru:8:16")
    gpu_layers.write_reference([gpu_layers.parse(layer, 28) for layer in layers], path)
    return np.load(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        "lem:8:16",
        "lru:8:16",
        *(pytest.param(layer, marks=pytest.mark.slow) for layer in ("gru:8:32", "lstm:8:16", "gru:8:32:2")),
    ],
)
def test_layers_are_measured_and_right(layer, reference):
    rows = gpu_layers.measure(gpu_layers.parse(layer, 28), lambda: reference, rounds=2, seconds=1e-4)
    found = {row["contender"]: row for row in rows}
    assert not [row for name, row in found.items() if name in gpu_layers.OURS and "problem" in row]
    tolerances = {"float32": 1e-5, "scan": 1e-3, "tensorfloat32": 1e-3, "bfloat16": 3e-2}
    for name in gpu_layers.OF_INDEPENDENT if layer.startswith("lru") else tolerances:
        tolerance = tolerances[name]
        assert found[name]["forward"]["milliseconds"] > 0
        assert found[name]["both"]["milliseconds"] > 0
        assert 0 < found[name]["last_error"] < tolerance
        assert 0 < found[name]["gradient_error"] < tolerance
        assert found[name]["equal_bits"]
    if "cudnn float32" in found and "problem" not in found["cudnn float32"]:
        assert found["cudnn float32"]["gradient_error"] < 1e-5
    assert f"{gpu_layers.parse(layer, 28).cell} 8, batch" in gpu_layers.table(rows)
    json.dumps(rows)


@pytest.mark.slow
def test_the_reference_is_that_of_every_batch(reference):
    """Batches of any size hold the same sequences, with weights that leave the gradients as they are."""
    for layer in ("lem:8:16", "lem:8:64"):
        case = gpu_layers.parse(layer, 28)
        problem = gpu_layers.draw(case)
        grads, last = gpu_layers.gradients(gpu_layers.layer(case))(*problem[:3])
        grads = {name: np.asarray(grad) for name, grad in grads.items()}
        told = gpu_layers.errors(case, problem, (np.asarray(last), grads), reference)
        assert told["last_error"] < 1e-5
        assert told["gradient_error"] < 1e-5
        assert told["gradient_of"] in problem.params


def test_what_fails_is_a_row(tmp_path, monkeypatch):
    gpu_layers.write_reference([gpu_layers.parse("gru:8:32", 28)], tmp_path / "reference.npz")
    reference = np.load(tmp_path / "reference.npz")
    failing = {"bfloat16": {}, "float32": {"precision": "none", "backend": "scan"}}
    monkeypatch.setattr(gpu_layers, "OURS", failing)
    monkeypatch.setattr(gpu_layers, "CUDNN", {})
    rows = gpu_layers.measure(gpu_layers.parse("gru:8:32:2", 28), lambda: reference, rounds=1, seconds=1e-4)
    found = {row["contender"]: row for row in rows}
    assert "precision is 'none'" in found["float32"]["problem"]
    assert found["bfloat16"]["both"]["milliseconds"] > 0
    assert "gru 8, batch 32 x 2, float32: ValueError" in gpu_layers.table(rows)


@pytest.mark.slow
def test_a_slow_command_ends_with_what_it_has_started(tmp_path):
    bench = gpu.Bench(tmp_path / "out", tmp_path / "scratch", rehearse=True)
    bench.begin("engine", 60)
    start = time.perf_counter()
    slow = bench.run("slow", ["bash", "-c", "echo begun; sleep 50 & sleep 50"], 2.5)
    assert slow.code is None
    assert slow.text == "begun\n"
    assert time.perf_counter() - start < 20
    assert bench.run("quick", [sys.executable, "-c", "print(1)"], 50).code == 0
    bench.begin("cells", 1)
    assert bench.run("late", ["true"], 50).seconds == 0
    log = (tmp_path / "out" / "engine.log").read_text()
    assert "ran out of time" in log
    assert "exit code 0" in log
    bench.note("engine", "rows", [])
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == {"engine": {"rows": []}}


def small_run(folder, seed):
    config = row_lstm.get_config()
    changes = {"data.source": "embedded", "model.hidden_size": 8, "train.steps": 6, "train.eval_every": 3, "seed": seed}
    config.update_from_flattened_dict(changes)
    train(build_run(config), folder, watch=QUIET)
    return folder


@pytest.mark.slow
def test_runs_are_told_of_and_compared(tmp_path):
    first, again, other = (small_run(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    told = gpu.tell(first, DONE)
    assert told["steps"] == 6
    assert told["wall_seconds"] == 5.0
    assert told["rest_seconds"] < 5.0
    assert gpu.equal_bits(first, again)["equal"]
    differing = gpu.equal_bits(first, other)
    assert not differing["equal"]
    assert differing["differing"]
    assert "no result" in gpu.equal_bits(first, tmp_path / "none")["problem"]
    (first / "summary.json").unlink()
    unfinished = gpu.tell(first, gpu.Done(None, 5.0, ""))
    content = {
        "training": {"row_lstm": told, "pixel_gru": unfinished},
        "checks": {"twice": gpu.equal_bits(again, again), "others": differing},
    }
    table = gpu.table(content)
    assert "| row_lstm | " in table
    assert "| pixel_gru | not finished: step 6 after 5.0 s, exit code None |" in table
    assert "| twice | equal bits |" in table
    assert "arrays differ" in table


@pytest.mark.slow
def test_all_of_it(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", "benchmarks/gpu.sh", "--rehearse", "--stretch=3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert {"machine", "seconds", *gpu.PARTS} <= content.keys()
    told = [facts for part in gpu.PARTS for facts in content[part].values() if isinstance(facts, dict)]
    assert not [facts for facts in told if "problem" in facts]
    assert content["checks"]["tests"]["passed"] > 0
    assert content["checks"]["rows deterministic: two runs"]["equal"]
    assert content["checks"]["made on the CPU, read here"]["images_changed_at_least"] == 0
    assert content["checks"]["made on the CPU, resumed here"]["steps"] == 500
    assert [row["seed"] for row in content["training"]["speedrun"]["rows"]] == [10, 11]
    assert (tmp_path / "start.txt").stat().st_size > 1000
    assert "gru 8, batch 32 x 2, both" in done.stdout
