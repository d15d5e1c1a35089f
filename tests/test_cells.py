"""The field's cells in runs, and their page."""

import json
import re

import jax
import numpy as np
import pytest

import seqmnist_jax
from seqmnist_jax.errors import UsageError
from seqmnist_jax.models import CELLS
from seqmnist_jax.models.cells.registry import known_options, with_options
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import train
from tests import tiny
from tests.launching import ROOT, launch

PAGE = (ROOT / "docs" / "cells.md").read_text()
TRAIN = re.search(r"^python launch.py (.*) \\\n +--config.model.cell_options=\"(.*)\" (.*)$", PAGE, re.M)
SHORT = ["--config.data.source=embedded", "--config.train.eval_every=10", "--config.train.steps=20"]


@pytest.mark.slow
def test_the_page_s_command_trains_and_resumes(tmp_path):
    before, options, after = TRAIN.groups()
    command = [*before.replace("configs/", f"{ROOT}/configs/").split(), *after.split(), *SHORT]
    command += ["--config.model.hidden_size=16", "--config.runtime.backend=fused"]
    done = launch([*command, f"--config.model.cell_options={options}"], tmp_path)
    assert done.returncode == 0, done.stderr
    model = seqmnist_jax.load(tmp_path / "runs/lem")
    params = model.params["rnn"]["layer_0"]["forward"]
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28), np.uint8)
    states = {
        dt: with_options(CELLS["lem"].cell, (("dt", dt),)).layer(params, np.float32(images / 255), backend="scan")[1]
        for dt in (0.5, 0.31)
    }
    np.testing.assert_allclose(model.states(images), states[0.5], atol=1e-4)
    assert np.abs(states[0.5] - states[0.31]).max() > 0.01
    done = launch([*command, "--config.model.cell_options={'dt': 0.25}"], tmp_path)
    assert done.returncode == 1
    assert "model.cell_options: \"{'dt': 0.5}\" there, \"{'dt': 0.25}\" here" in done.stderr


def of(name, **changes):
    changes = {"train.steps": 20, "train.eval_every": 10, "runtime.backend": "fused", **changes}
    return build_run(tiny.config(**{"model.cell": name, **changes}))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, choice in CELLS.items() if not choice.step])
def test_each_learns(name, tmp_path):
    changes = {"model.num_layers": 2, "model.bidirectional": True, "train.steps": 200, "train.eval_every": 100}
    # Its defaults are for 784 steps: of 28 so short ones nothing comes.
    options = "{'dt': 0.3, 'epsilon': 1}" if name == "cornn" else ""
    run = of(name, **changes, **{"model.cell_options": options})
    train(run, tmp_path / "run", watch=QUIET)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.2, "chance is 0.1"


def test_impossible_numbers_are_told_before_training():
    with pytest.raises(UsageError, match=r"its init fails for 28 features and 8 units: ValueError: r_min, r_max"):
        of("lru", **{"model.cell_options": "{'r_min': 2}"}).learner.init()


def test_the_page_names_all_with_their_parameters_and_numbers():
    rows = re.findall(r"^\| `(\w+)` \| \[.*?\]\(https://\S+\) \| [\w, ]+ \| ([\d,]+) \|", PAGE, re.M)
    assert {name: int(count.replace(",", "")) for name, count in rows} == {
        name: sum(
            leaf.size
            for leaf in jax.tree.leaves(jax.eval_shape(lambda init=choice.cell.init: init(jax.random.key(0), 1, 128)))
        )
        for name, choice in CELLS.items()
    }
    told = {
        name: re.findall(r"`(\w+)` \(", text) for name, text in re.findall(r"^\| `(\w+)` \| (`.*`.*) \|$", PAGE, re.M)
    }
    assert told == {
        name: list(known_options(choice.cell)) for name, choice in CELLS.items() if known_options(choice.cell)
    }
