"""What a loaded model says of images: classes, probabilities after each step, features, states."""

import doctest
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import seqmnist_jax
from seqmnist_jax import rnn
from seqmnist_jax.workdir.checkpoints import CheckpointError
from seqmnist_jax.workdir.files import WorkdirError
from tests.untrained import HEIGHT, HIDDEN, WIDTH, random_images, write_run

ROOT = Path(__file__).parent.parent
IMAGES = random_images(11, seed=5)
MODELS = {
    "lstm": {"model.num_layers": 2, "model.norm": "batch", "data.permutation": "numpy:3"},
    "tcn": {"model.name": "tcn", "model.num_layers": 2, "model.kernel_size": 2},
    "both_ways": {"model.cell": "gru", "model.bidirectional": True, "model.norm": "batch"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of each model, whose config reads four images at a time."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: write_run(folder / name, **{"runtime.eval_batch_size": 4}, **MODELS[name]) for name in MODELS}


@pytest.fixture
def workdir(tmp_path):
    return write_run(tmp_path / "run", **{"data.permutation": "numpy:3"})


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def apply(model, images, steps=None):
    """The network on the first steps of images, without what is under test."""
    x = model.learner.view(jnp.asarray(images))[:, :steps]
    return jax.jit(model.learner.model.apply)(model.variables, x)


def test_the_docstring_holds(monkeypatch):
    monkeypatch.chdir(ROOT)
    test = doctest.DocTestFinder().find(seqmnist_jax.load, globs={})[0]
    assert len(test.examples) >= 6
    assert doctest.DocTestRunner().run(test).failed == 0


def test_importing_the_package_imports_nothing_else():
    code = "import seqmnist_jax, sys; print(*({'jax', 'numpy', 'flax', 'orbax', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_classes(runs, name):
    model = seqmnist_jax.load(runs[name])
    logits = model.logits(IMAGES)
    assert (logits.shape, logits.dtype) == ((11, 10), np.float32)
    np.testing.assert_allclose(logits, apply(model, IMAGES), atol=1e-5)
    np.testing.assert_array_equal(model.predict(IMAGES), logits.argmax(-1))
    np.testing.assert_array_equal(model.logits(IMAGES.reshape(11, HEIGHT * WIDTH)), logits)
    np.testing.assert_allclose(model.logits(IMAGES[:1]), logits[:1], atol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["lstm", "tcn"])
def test_reading_is_what_the_model_says_of_a_sequence_that_ends_there(runs, name):
    model = seqmnist_jax.load(runs[name])
    p = model.read(IMAGES)
    assert (p.shape, p.dtype) == ((11, HEIGHT, 10), np.float32)
    for step in range(1, HEIGHT + 1):
        np.testing.assert_allclose(p[:, step - 1], jax.nn.softmax(apply(model, IMAGES, step)), atol=1e-5)
    np.testing.assert_array_equal(p[:, -1].argmax(-1), model.predict(IMAGES))


@pytest.mark.parametrize("name", MODELS)
def test_features_are_what_the_dense_layer_sees(runs, name):
    model = seqmnist_jax.load(runs[name])
    features, dense = model.features(IMAGES), model.params["dense"]
    assert (features.shape, features.dtype) == ((11, HIDDEN * (1 + (name == "both_ways"))), np.float32)
    np.testing.assert_allclose(features @ dense["kernel"] + dense["bias"], model.logits(IMAGES), atol=1e-4)


@pytest.mark.parametrize(("name", "layer"), [("lstm", rnn.lstm), ("both_ways", rnn.gru)])
def test_states_are_what_the_top_layer_hands_on(runs, name, layer):
    model = seqmnist_jax.load(runs[name])
    states = model.states(IMAGES)
    assert states.dtype == np.float32
    x = model.learner.view(jnp.asarray(IMAGES))
    for directions in model.params["rnn"].values():
        hs = [layer(params, x, reverse=direction == "backward")[1] for direction, params in directions.items()]
        x = jnp.concatenate(hs[::-1] if next(iter(directions)) == "backward" else hs, axis=-1)
    np.testing.assert_allclose(states, x, atol=1e-5)


def test_what_a_model_can_not_tell(runs):
    with pytest.raises(ValueError, match="reads both ways"):
        seqmnist_jax.load(runs["both_ways"]).read(IMAGES)
    with pytest.raises(ValueError, match=r"no recurrent layer .*'tcn'"):
        seqmnist_jax.load(runs["tcn"]).states(IMAGES)


def test_no_images_give_empty_arrays(runs):
    model, none = seqmnist_jax.load(runs["lstm"]), IMAGES[:0]
    assert model.predict(none).shape == (0,)
    assert model.logits(none).shape == (0, 10)
    assert model.read(none).shape == (0, HEIGHT, 10)
    assert model.features(none).shape == (0, HIDDEN)
    assert model.states(none).shape == (0, HEIGHT, HIDDEN)


@pytest.mark.parametrize("way", ["logits", "predict", "read", "features", "states"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, HEIGHT, WIDTH), np.float32), "float32; expected uint8"),
        (np.zeros((HEIGHT, WIDTH), np.uint8), rf"expected \[count, {HEIGHT}, {WIDTH}\]"),
        (np.zeros((2, WIDTH, HEIGHT), np.uint8), rf"expected \[count, {HEIGHT}, {WIDTH}\]"),
    ],
)
def test_each_way_says_what_it_takes(runs, way, images, message):
    with pytest.raises(ValueError, match=message):
        getattr(seqmnist_jax.load(runs["lstm"]), way)(images)


def test_another_count_of_images_compiles_nothing(runs):
    model, lowered = seqmnist_jax.load(runs["lstm"]), []

    def listen(event, duration, **unused):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            lowered.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        counts = []
        for count in (11, 4, 5, 10, 3, 1, 1, 2, 2, 3):
            lowered.clear()
            assert len(model.logits(IMAGES[:count])) == count
            counts.append(len(lowered))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # Four at a time from three images on, and one and two by themselves.
    assert [n > 0 for n in counts] == [True, False, False, False, False, True, False, True, False, False]


def test_what_a_model_is(workdir):
    model = seqmnist_jax.load(workdir)
    assert model.step == 7
    assert model.config.model.hidden_size == HIDDEN
    assert model.facts["permutation"] == "numpy:3"
    assert set(model.params) == {"rnn", "dense"}


def test_nothing_is_said_where_all_is_well(workdir, caplog, capfd):
    with caplog.at_level(logging.INFO, logger="absl"):
        seqmnist_jax.load(workdir).predict(random_images(2, seed=1))
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


def test_another_permutation_is_refused(workdir):
    edit(workdir / "data.json", lambda facts: facts["permutation_indices"].reverse())
    with pytest.raises(CheckpointError, match="permutation_indices"):
        seqmnist_jax.load(workdir)
    edit(workdir / "data.json", lambda facts: facts["permutation_indices"].pop())
    with pytest.raises(WorkdirError, match=r"data\.json was cut"):
        seqmnist_jax.load(workdir)
    edit(workdir / "data.json", lambda facts: facts.pop("selection"))
    with pytest.raises(WorkdirError, match=r"data\.json.*selection"):
        seqmnist_jax.load(workdir)


def test_a_checkpoint_of_another_model_is_refused(workdir):
    edit(workdir / "config.json", lambda config: config["model"].update(hidden_size=17))
    with pytest.raises(CheckpointError, match="can't be restored"):
        seqmnist_jax.load(workdir)


def test_no_run_and_no_checkpoint(workdir, tmp_path):
    with pytest.raises(WorkdirError, match="work directory"):
        seqmnist_jax.load(tmp_path)
    (workdir / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        seqmnist_jax.load(workdir)
