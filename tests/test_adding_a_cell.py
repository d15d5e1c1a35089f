"""The page docs/adding-a-cell.md: its Python runs from top to bottom, and does what it says."""

import re
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn
from seqmnist_jax.models import build
from seqmnist_jax.training.run import build_run

pytestmark = pytest.mark.usefixtures("quick_compiler")

PAGE = (Path(__file__).parent.parent / "docs" / "adding-a-cell.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the page's blocks have defined, once all of them have run."""
    names = {"__name__": "page"}
    with mock.patch.dict(build.CELLS), pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, names)
        yield names


def test_the_cell_learns(names):
    summary = names["summary"]
    assert summary["dataset"]["source"] == "embedded"
    assert summary["test_accuracy"] > 0.4, "chance is 0.1"


def test_the_trained_model_is_loaded_by_its_cells_name(names):
    assert names["model"].config.model.cell == "elman"
    assert set(names["model"].params["rnn"]["layer_0"]["forward"]) == {"kernel", "recurrent_kernel", "bias"}


def test_lengths_and_directions_of_the_scanned_step(names):
    x, params, outputs = (jax.tree.map(np.asarray, names[name]) for name in ("x", "params", "outputs"))
    h = np.zeros(16)
    for t in reversed(range(20)):
        h = np.tanh(x[1, t] @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"])
        np.testing.assert_allclose(outputs[1, t], h, rtol=1e-5, atol=1e-5)
    assert not outputs[1, 20:].any()
    np.testing.assert_allclose(names["h"][1], h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", [rnn.Engine(remat=5), rnn.Engine(unroll=2)], ids=["remat", "unroll"])
def test_the_stack_runs_the_cell_as_any_other(names, engine):
    arguments = (names["ELMAN"], names["layers"], names["x"])
    assert names["last"].shape == (4, 32)
    found = rnn.stack(*arguments, lengths=names["lengths"], engine=engine)
    np.testing.assert_allclose(found, names["last"], rtol=1e-5, atol=1e-5)


def test_a_backend_that_the_cell_does_not_name_is_refused(names):
    with pytest.raises(ValueError, match=r"^backend is 'native'.*'auto'"):
        rnn.stack(names["ELMAN"], names["layers"], names["x"], engine=rnn.Engine(backend="native"))


def test_dropout_at_each_place(names):
    config = names["get_config"]()
    config.data.source = "embedded"
    for place in ("input_keep", "output_keep", "state_keep"):
        config.model.dropout[place] = 0.5
    learner = build_run(config).learner
    model, variables = learner.model, learner.init().variables

    def logits(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, jnp.ones((2, 28, 28)), train=True, keep=(0.5, 0.5, 0.5), rngs=rngs)

    assert np.isfinite(logits(0)).all()
    assert not np.allclose(logits(0), logits(1))
