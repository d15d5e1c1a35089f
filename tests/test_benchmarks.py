"""The benchmarks at tiny sizes: that they run, that all they print is finite, that peers compute the same."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import end_to_end, floor, peers, recurrence, scaling, time_to_accuracy, timing, trainers
from configs import pixel_gru, row_lstm

ROOT = Path(__file__).parent.parent
RATE = floor.Rate(1e10, (1, 1, 1))
CASE = peers.Case("gru", hidden=4, features=1, steps=6, batch=2)


def need(library):
    # Not importorskip, because Keras must learn its backend before it is imported.
    if not library.startswith("ours") and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def numbers(rows):
    return [value for row in rows for value in row.values() if isinstance(value, float)]


def test_programs_alternate_and_repeat():
    calls = []
    programs = {name: lambda count, name=name: calls.append((name, count)) for name in "ab"}
    timings = timing.alternate(programs, rounds=3, seconds=1e-5, least=2)
    assert list(timings) == ["a", "b"]
    measured = calls[-12:]  # each measurement and, before it, the same program untimed
    assert [name for name, _ in measured] == list("aabbbbaaaabb")
    assert all(count == timings[name].count >= 2 for name, count in measured[1::2])
    assert all(0 < t.lower <= t.median <= t.upper < 1 for t in timings.values())


def test_what_exceeds_the_budget_is_left_out():
    said = []
    programs = {"quick": lambda count: None, "slow": timing.repeated(lambda: sum(range(100_000)))}
    assert list(timing.alternate(programs, seconds=1e-3, budget=1e-3, least=100, say=said.append)) == ["quick"]
    assert len(said) == 1
    assert "slow" in said[0]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("cell", list(peers.CELLS))
@pytest.mark.parametrize("library", list(peers.LIBRARIES))
def test_losses_agree(library, cell):
    need(library)
    case = peers.Case(cell, hidden=8, features=3, steps=12, batch=4)
    assert peers.disagreement(library, case) <= (0.03 if library == "ours_bfloat16" else 1e-5)


def test_what_can_not_be_had_is_left_out(monkeypatch):
    said = []
    monkeypatch.setitem(peers.LIBRARIES, "ours", peers._jax(peers.ours, backend="none"))
    assert peers.build("ours", CASE, say=said.append) is None
    assert "backend" in said[0]
    assert peers.build("torch", CASE._replace(replicas=2), say=said.append) is None


@pytest.mark.parametrize("library", ["ours", "torch"])
def test_repetitions_change_the_weights_and_can_not_be_left_out(library, monkeypatch):
    need(library)
    monkeypatch.setattr(peers, "FEEDBACK", 1e-2)
    layer = peers.LIBRARIES[library](CASE)
    before = layer.loss()
    result = layer.measurable("step").run(50)
    if library == "torch":
        assert layer.loss() < 0.9 * before  # its weights are changed in place
    else:
        start = peers.draw(CASE)[0]
        assert all(np.abs(result[name] - start[name]).max() > 1e-4 for name in start)


def test_the_floor_counts_products():
    case = peers.Case("lstm", hidden=5, features=3, steps=7, batch=2)
    rows, columns = 7 * 2, 4 * 5
    assert floor.flops(case, "forward") == 2 * rows * columns * (3 + 5)
    assert floor.flops(case, "step") == 2 * rows * columns * (2 * 3 + 3 * 5)
    assert floor.flops(case._replace(replicas=2), "step") == 2 * floor.flops(case, "step")
    rate = floor.best_rate(shapes=((2, 2, 2), (256, 256, 256)), rounds=3, seconds=1e-3)
    assert rate.flops > 0
    assert rate.shape == (256, 256, 256)


@pytest.mark.slow
def test_recurrence_and_its_table():
    libraries = ["ours", "ours_scan"]
    rows = recurrence.measure(CASE, "forward", libraries, RATE, rounds=1, seconds=1e-3)
    rows += recurrence.measure(CASE, "step", libraries, RATE, rounds=2, seconds=1e-3, single=True)
    rows += recurrence.measure_replicas("lstm", 4, 6, 2, ["ours"], RATE, rounds=1, seconds=1e-3)
    assert len(rows) == 6
    assert all(math.isfinite(number) and number > 0 for number in numbers(rows))
    assert recurrence.table(rows).count("\n") == 5
    assert recurrence.measure(CASE, "step", libraries, RATE, budget=1e-12) == []


def test_the_default_cases_are_the_headline():
    assert len(recurrence.cases(["gru", "lstm"], (), (), ())) == 8
    assert recurrence.cases(["gru"], (), (28,), (4,)) == [peers.Case("gru", 128, 28, 28, 4)]


def test_scaling_knows_memory_where_it_can_not_run(monkeypatch):
    monkeypatch.setattr(recurrence, "available_bytes", lambda: 60_000)
    rows = scaling.measure(CASE, "steps", (6, 600), ["ours_scan"], rounds=1, seconds=1e-3)
    assert [row["steps"] for row in rows] == [6, 600]
    assert rows[0]["milliseconds"] > 0
    assert rows[1]["milliseconds"] is None
    assert rows[1]["temp_bytes"] > 50 * rows[0]["temp_bytes"] > 0


def small(config):
    config.data.source = "embedded"
    config.data.view = "row"
    config.model.hidden_size = 6
    config.model.kernel_init = config.model.dense_init = "glorot_uniform"  # compiles sooner than a QR
    config.train.batch_size = 4
    config.train.eval_every = 2
    config.train.steps = 4
    if config.optimizer.schedule == "warmup_cosine":
        config.optimizer.warmup_steps = 1
    return config


@pytest.mark.sampled(1)
@pytest.mark.parametrize("config", [row_lstm, pixel_gru], ids=["row_lstm", "pixel_gru"])
def test_pytorch_trains_the_same(config):
    need("torch")
    config = small(config.get_config())
    config.optimizer.clip.norm = 0.05
    ours, torch = trainers.OurTrainer(config), trainers.TorchTrainer(config)
    start = ours.tensors()
    for trainer in (ours, torch):
        trainer.advance(4)
    expected, found = ours.tensors(), torch.tensors()
    assert found.keys() == expected.keys()
    for name in expected:
        moved = np.abs(expected[name] - start[name]).max()
        assert moved > 1e-5, name
        assert np.abs(found[name] - expected[name]).max() <= 5e-3 * moved + 1e-7, name


def test_pytorch_refuses_what_it_does_not_have():
    need("torch")
    config = small(row_lstm.get_config())
    config.model.norm = "batch"
    with pytest.raises(peers.Unavailable, match=r"model\.norm"):
        trainers.TorchTrainer(config)


@pytest.mark.slow
def test_end_to_end():
    rows = end_to_end.measure("row_lstm", small(row_lstm.get_config()), ["ours", "torch"], rounds=1, seconds=0.01)
    assert rows[0]["library"] == "ours"
    assert all(math.isfinite(number) and number > 0 for number in numbers(rows))


@pytest.mark.slow
def test_replicas_train():
    config = row_lstm.get_config()
    config.update_from_flattened_dict({"data.source": "embedded", "model.hidden_size": 4, "train.batch_size": 40})
    advance = trainers.OurTrainer(config, 2).advance
    advance(3)
    # Past the end of an epoch, which is the end of a dispatch.
    advance(4000 // 40 * 2)


def test_time_to_accuracy_stops_at_the_target_or_at_the_end():
    config = small(row_lstm.get_config())
    row = time_to_accuracy.measure(config, "ours", target=0.0)
    assert row["reached"]
    assert row["steps"] == 2
    need("torch")
    rows = [time_to_accuracy.measure(config, library, target=1.1) for library in ("ours", "torch")]
    for row in rows:
        assert not row["reached"]
        assert row["steps"] == 4
        assert 0 < row["train_seconds"] + row["evaluate_seconds"] <= row["total_seconds"]
    assert abs(rows[0]["validation_accuracy"] - rows[1]["validation_accuracy"]) <= 0.002


@pytest.mark.slow
def test_the_commands(tmp_path):
    path = tmp_path / "figures.json"
    sizes = ["--hidden=4", "--steps=6"]
    options = ["--batch=2,3", "--cells=gru", "--kinds=step", "--libraries=ours", "--rounds=1", "--seconds=0.001"]
    command = [sys.executable, "-m", "benchmarks.recurrence", *sizes, *options, "--noreplicas", f"--json={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| step, gru, hidden 4, 6 steps of 1, batch 3 |" in done.stdout
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 2
    assert {"device", "cores", "versions", "commit", "date", "floor"} <= content.keys()

    pytest.importorskip("matplotlib")
    from benchmarks import plot

    assert len(plot.select(content["rows"], "gru", 4, 6)) == 2
    plot.draw(content["rows"], "title").savefig(tmp_path / "speed.png")
    rows = scaling.measure(CASE, "batch", (1, 2), ["ours"], rounds=1, seconds=1e-3)
    scaling.draw(rows, "title", tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 1000
