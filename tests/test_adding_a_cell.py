"""The page docs/adding-a-cell.md, run as its reader would; a user's own cell in a run, in a stack, and gone wrong."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqmnist_jax
from seqmnist_jax import rnn
from seqmnist_jax.errors import UsageError
from seqmnist_jax.models import own_cell
from seqmnist_jax.models.cells.registry import known_options, with_options
from seqmnist_jax.rnn.cell import hidden_size
from seqmnist_jax.training.run import build_run
from tests import tiny
from tests.launching import ROOT, launch

PAGE = (ROOT / "docs" / "adding-a-cell.md").read_text()
MODULE, LOADING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TRAIN, REPORT = re.findall(r"^python launch.py (.*)$", PAGE, re.M)
# At the page's rate so few steps end anywhere from chance to 30 %.
SHORT = ["--config.data.source=embedded", "--config.train.eval_every=200", "--config.optimizer.learning_rate=3e-4"]


def command(text, *more):
    return [*text.replace("configs/", f"{ROOT}/configs/").split(), *more]


def message_of(done, exit_code):
    assert "Traceback" not in done.stderr
    assert done.returncode == exit_code, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's commands have been given."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "my_cells.py").write_text(MODULE)
    done = launch(command(TRAIN, *SHORT, "--config.train.steps=400"), folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    """The same elsewhere, to be changed."""
    shutil.copytree(folder, tmp_path / "copy")
    config = tmp_path / "copy" / "runs" / "elman" / "config.json"
    config.write_text(config.read_text().replace(str(folder), str(tmp_path / "copy")))
    return tmp_path / "copy"


@pytest.fixture
def own(folder, monkeypatch):
    """The page's cell can be imported in this process."""
    monkeypatch.chdir(folder)
    yield own_cell.find("my_cells:elman").cell
    del sys.modules["my_cells"]


# A run.


def test_the_cell_learns_and_is_recorded(folder):
    run = folder / "runs" / "elman"
    assert json.loads((run / "summary.json").read_text())["test_accuracy"] > 0.5, "chance is 0.1"
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["cell_hash"] == hashlib.sha256(MODULE.encode()).hexdigest()
    assert config["runtime"]["cell_file"] == str(folder / "my_cells.py")
    assert launch(command(REPORT), folder).returncode == 0
    assert "my_cells:elman" in (run / "report.html").read_text()


def test_the_page_loads_it(own, folder):
    names = {}
    exec(LOADING, names)
    assert names["model"].config.model.cell == "my_cells:elman"
    assert set(names["model"].params["rnn"]["layer_0"]["forward"]) == {"w", "u", "b"}


def test_loading_says_that_the_file_has_changed(copied, monkeypatch):
    monkeypatch.chdir(copied)
    Path("my_cells.py").write_text(f"{MODULE}\n# Another word.\n")
    with pytest.warns(UserWarning, match=r"my_cells.py, the file of the cell my_cells:elman, has changed since"):
        seqmnist_jax.load("runs/elman")
    del sys.modules["my_cells"]


def test_it_is_found_from_another_folder_by_its_recorded_file(folder, tmp_path):
    (tmp_path / "my_cells.py").write_text("elman = 'of the same name, and nothing to the run'\n")
    done = launch([f"--workdir={folder}/runs/elman", "--mode=export"], tmp_path)
    assert done.returncode == 0, done.stderr
    network = json.loads((folder / "runs" / "elman" / "export" / "export.json").read_text())["network"]
    assert network["step"][0] == "def step(params, h, x):"


def test_it_resumes_and_a_changed_file_is_told(copied):
    done = launch(command(TRAIN, *SHORT, "--config.train.steps=401"), copied)
    assert "Resuming at step 400" in done.stdout, done.stderr
    with (copied / "my_cells.py").open("a") as module:
        module.write("# Another word.\n")
    done = launch(["--mode=evaluate", "--workdir=runs/elman"], copied)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "has changed" in line]
    assert line.startswith(f"WARNING: {copied}/my_cells.py, the file of the cell my_cells:elman,")
    done = launch(command(TRAIN, *SHORT, "--config.train.steps=402"), copied)
    assert "content hash of the cell's file: " in message_of(done, 1)


def test_a_missing_file_is_an_error_that_says_what_was_expected(copied):
    (copied / "my_cells.py").unlink()
    said = message_of(launch(["--mode=evaluate", "--workdir=runs/elman"], copied), 2)
    assert f"no module my_cells in {copied} or" in said
    assert f"nor at {copied}/my_cells.py, where the run had it; expected my_cells.py" in said


@pytest.mark.slow
def test_replicas_both_ways_with_all_kinds_of_dropout(folder, tmp_path):
    changes = ["bidirectional=True", "num_layers=2", "hidden_size=8"]
    changes += [f"dropout.{place}=0.9" for place in ("input_keep", "output_keep", "state_keep")]
    given = [*(f"--config.model.{change}" for change in changes), *SHORT, "--config.train.steps=2", "--seeds=1-2"]
    done = launch(command(TRAIN.replace("runs/elman", str(tmp_path)), *given), folder)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("replicas/*/summary.json"))) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.kernel_init", "orthogonal"),
        ("model.gate_bias", "log_uniform"),
        ("model.forget_bias", 2.0),
        ("model.precision", "bfloat16"),
        ("runtime.eval_precision", "bfloat16"),
        ("runtime.backend", "fuzed"),
    ],
)
def test_what_it_does_not_read_is_refused(own, field, value):
    with pytest.raises(UsageError, match=field):
        build_run(tiny.config(**{"model.cell": "my_cells:elman", field: value}))


# What is no cell.

MODULES = {
    "broken": ("x = (", r"importing broken fails: SyntaxError: .*broken.py, line 1"),
    "raising": ("\n1 / 0", r"importing raising fails \(.*raising.py:2\): ZeroDivisionError"),
    "needing": ("import nonesuch", r"importing needing fails \(.*: No module named 'nonesuch'"),
    "other": ("from seqmnist_jax import rnn\nelman = rnn.GRU", r"other.py has no 'elmann'\. Did you mean 'elman'\?"),
    "function": ("def elmann(): pass", r"a function; expected an rnn.Cell, as rnn.cell\(step, init\) makes it"),
}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_without_the_cell(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, expected = MODULES[module]
    Path(f"{module}.py").write_text(text)
    with pytest.raises(UsageError, match=rf"^model.cell is '{module}:elmann'.*{expected}"):
        own_cell.find(f"{module}:elmann")
    sys.modules.pop(module, None)


@pytest.mark.parametrize("name", ["my_cells.py:elman", "a/b:elman", "my_cells:", ":elman", "a:b:c"])
def test_a_name_that_is_none(name):
    with pytest.raises(UsageError, match="expected MODULE:NAME, as my_cells:elman"):
        own_cell.find(name)


def start(key, features, hidden_size):
    return {"w": jnp.zeros((features, hidden_size)), "u": jnp.zeros((hidden_size, hidden_size))}


STEPS = {
    "raises": (lambda p, h, x: (h, x @ p["w"].T), r"step fails .*test_adding_a_cell.py:\d+\): TypeError: dot_general"),
    "grows": (lambda p, h, x: (jnp.concatenate([h, h], 1), h), r"carry float32\[3, 8\] float32\[3, 16\]"),
    "dtype": (lambda p, h, x: (h.astype(jnp.bfloat16), h), r"carry float32\[3, 8\] bfloat16\[3, 8\]"),
    "one": (lambda p, h, x: h, r"step gives float32\[3, 8\]; expected \(carry, y\)"),
    "narrow": (lambda p, h, x: (h, h[:, :4]), r"y is float32\[3, 4\]; expected \[3, 8\]"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_does_not_fit(step):
    function, expected = STEPS[step]
    with pytest.raises(UsageError, match=rf"^model.cell is 'a:b', but its .*{expected}"):
        own_cell.check("a:b", rnn.cell(function, start), 5, 8, {}, rnn.Engine())


def test_an_init_that_does_not_fit():
    for init, expected in (
        (lambda key, f, n: [jnp.zeros(n)], "a dict"),
        (lambda key, f, n: {"w": [jnp.zeros(n)]}, "a dict"),
        (lambda key, f, n: jnp.zeros(n), "a dict"),
        (lambda key, f, n: {"w": jnp.zeros(n), "n": jnp.int32(3)}, "floating"),
        (lambda key, f, n: f"{1 / 0}", "Zero"),
    ):
        with pytest.raises(UsageError, match=f"its init .*{expected}"):
            own_cell.check("a:b", rnn.cell(lambda p, h, x: (h, h), init), 5, 8, {}, rnn.Engine())


LEAKY = """
import jax.numpy as jnp
from seqmnist_jax import rnn

def step(p, h, x):
    h = {rate} * h + x @ p["w"]
    return h, h

leaky = rnn.cell(step, lambda key, features, hidden_size: {{"w": jnp.ones((features, hidden_size))}})
"""


def test_a_cell_is_that_of_its_file_though_another_was_imported(tmp_path, monkeypatch):
    found = {}
    for folder, rate in (("a", 0.5), ("b", 0.25), ("b", 0.125)):
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "cells_of_one_name.py"
        file.write_text(LEAKY.format(rate=rate))
        monkeypatch.chdir(tmp_path / folder)
        found[rate] = own_cell.find("cells_of_one_name:leaky")
    monkeypatch.chdir(tmp_path)
    found["a again"] = own_cell.find("cells_of_one_name:leaky", str(found[0.5].file), found[0.5].content_hash)
    del sys.modules["cells_of_one_name"]
    for rate, one in found.items():
        h, _ = one.cell.step({"w": jnp.ones((1, 1))}, jnp.ones((1, 1)), jnp.zeros((1, 1)))
        assert h == (0.5 if rate == "a again" else rate)
    assert found["a again"].content_hash == found[0.5].content_hash
    assert len({one.content_hash for one in found.values()}) == 3


def test_a_cell_s_numbers_also_where_init_alone_takes_them():
    def init(key, features, hidden_size, groups=2):
        return {"w": jnp.ones((features, hidden_size)), "a": jnp.ones(groups * hidden_size)}

    def step(p, h, x, rate=0.5):
        h = rate * h + x @ p["w"] + p["a"].reshape(-1, h.shape[1]).sum(0)
        return h, h

    for cell, options, known in (
        (rnn.cell(lambda p, h, x: step(p, h, x), init), {"groups": 3}, {"groups": 2}),
        (rnn.cell(step, init), {"groups": 3, "rate": 0.25}, {"groups": 2, "rate": 0.5}),
        # A layer of its own is kept, and does not know what the step is given.
        (rnn.cell(step, init)._replace(layer=rnn.GRU.layer, backends=("auto",)), {"groups": 3}, {"groups": 2}),
    ):
        assert known_options(cell) == known
        changed = with_options(cell, tuple(sorted(options.items())))
        assert (changed.layer is cell.layer) == (cell.layer is rnn.GRU.layer)
        params = changed.init(jax.random.key(0), 3, 4)
        assert params["a"].shape == (12,)
        if cell.layer is not rnn.GRU.layer:
            h, _ = changed.layer(params, jnp.zeros((1, 1, 3)))
            np.testing.assert_allclose(h, 3.0)


def test_dropout_of_a_state_that_the_step_does_not_hand_on():
    for cell in ("lru", "diagonal"):
        drops = tiny.config(**{"model.cell": cell, "model.dropout.state_keep": 0.5})
        with pytest.raises(UsageError, match=rf"model\.cell is '{cell}', but .*state_keep.* none is its output"):
            build_run(drops).learner.template  # noqa: B018


def test_dropout_of_a_state_that_begins_with_parameters():
    def step(params, h, x):
        h = jnp.tanh(params["w"] * h + x)
        return h, h

    kind = rnn.cell(step, lambda key, f, n: {"w": jnp.full(n, 0.5)}, lambda zero, params: zero + params["w"])
    x, mask = np.linspace(-1, 1, 2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4), np.float32([[2, 0, 2, 0], [0, 2, 2, 2]])
    masks = {"layer_0": {"forward": rnn.Masks(state=jnp.asarray(mask))}}
    y = rnn.stack(kind, {"layer_0": {"forward": kind.init(None, 4, 4)}}, x, masks=masks, return_sequences=True)
    h, expected = np.full((2, 4), 0.5), []
    for t in range(3):
        expected.append(np.tanh(0.5 * h + x[:, t]))
        h = expected[-1] * mask
    np.testing.assert_allclose(y, np.stack(expected, 1), atol=1e-6)


def test_functions_that_can_not_be_called_so():
    with pytest.raises(ValueError, match=r"expected step\(params, carry, x\): missing a required argument: 'mask'"):
        rnn.cell(lambda params, h, x, mask: (h, h), start)
    with pytest.raises(ValueError, match=r"expected init\(key, features, hidden_size\): too many"):
        rnn.cell(lambda p, h, x: (h, h), lambda key: {})


# The engine's side.


@pytest.mark.slow
def test_of_the_lstm_s_step_it_makes_an_lstm():
    own = rnn.cell(rnn.lstm_step, rnn.init_lstm, lambda zero: (zero, zero))
    params = rnn.init_stack(jax.random.key(0), own, 5, 8, num_layers=2, bidirectional=True)
    x = jax.random.normal(jax.random.key(1), (4, 9, 5))
    lengths = jnp.array([9, 4, 1, 6])
    masks = {
        f"layer_{layer}": {
            way: rnn.draw_masks(jax.random.key(layer), (0.5,) * 3, 4, width, 8, x.dtype)
            for way in ("forward", "backward")
        }
        for layer, width in enumerate((5, 16))
    }
    ways = [(rnn.Engine(), masks), (rnn.Engine(remat=3), masks), (rnn.Engine(unroll=2), None)]
    for engine, given in [*ways, (rnn.Engine(precision="bfloat16"), None)]:
        options = {"lengths": lengths, "engine": engine, "masks": given}
        wanted = rnn.stack(rnn.LSTM, params, x, **options)
        np.testing.assert_allclose(rnn.stack(own, params, x, **options), wanted, rtol=1e-5, atol=1e-5)


def test_dropout_of_the_state_needs_an_output_that_is_part_of_the_carry():
    cell = rnn.cell(lambda p, carry, x: (carry, 2 * carry[0]), start, lambda zero: (zero, zero))
    masks = {"layer_0": {"forward": rnn.Masks(state=jnp.ones((2, 8)))}}
    params = rnn.init_stack(jax.random.key(0), cell, 5, 8, num_layers=1, bidirectional=False)
    with pytest.raises(ValueError, match=r"^masks.state is given, but of the 2 arrays"):
        rnn.stack(cell, params, jnp.ones((2, 3, 5)), masks=masks)


def test_a_stack_is_told_from_a_layer():
    params = rnn.init_gru(jax.random.key(0), 5, 8)
    with pytest.raises(ValueError, match=r"^params has \['bias', .*; expected 'layer_0' and so on"):
        rnn.stack(rnn.GRU, params, jnp.ones((2, 3, 5)))
    with pytest.raises(ValueError, match=r"^num_layers is 0; expected a whole number, at least 1"):
        rnn.init_stack(jax.random.key(0), rnn.GRU, 5, 8, num_layers=0, bidirectional=False)


def test_python_s_own_modules_have_no_cell():
    with pytest.raises(UsageError, match="but the module time has no 'gru'"):
        own_cell.find("time:gru")


def test_the_number_of_units_is_not_told_by_an_axis_that_grows_unevenly():
    def init(key, features, hidden_size):
        return {"angles": jnp.ones(hidden_size * (hidden_size - 1) // 2), "kernel": jnp.ones((features, hidden_size))}

    cell = rnn.cell(lambda params, h, x: (h, h), init)
    assert hidden_size(cell, init(None, 5, 6), 5) == 6


@pytest.mark.parametrize("cell", [rnn.LSTM, rnn.GRU, rnn.GRU_RESET_BEFORE])
def test_the_number_of_units_is_told_by_the_parameters(cell):
    assert hidden_size(cell, cell.init(jax.random.key(0), 5, 6), 5) == 6
    with pytest.raises(ValueError, match="expected those of the cell's init"):
        hidden_size(cell, {"kernel": jnp.ones((5, 6))}, 5)


def test_an_init_that_makes_only_some_sizes_is_told_to_give_a_carry():
    def init(key, features, hidden_size):
        if hidden_size != 4:
            raise ValueError(f"hidden_size is {hidden_size}; expected 4")
        return {"kernel": jnp.ones((features, hidden_size))}

    cell = rnn.cell(lambda params, h, x: (x @ params["kernel"], h), init)
    params, x = init(None, 5, 4), jnp.ones((2, 3, 5))
    with pytest.raises(
        ValueError, match=r"with \(192, 384, 576\), and fails: .*expected 4 \(a layer that is given a carry"
    ):
        cell.layer(params, x)
    assert cell.layer(params, x, jnp.zeros((2, 4)))[0].shape == (2, 4)


@pytest.mark.parametrize("backend", ["auto", "scan"])
def test_what_is_explained_is_what_runs(own, backend):
    params, x = own.init(jax.random.key(0), 5, 8), jnp.ones((2, 3, 5))
    program = str(jax.make_jaxpr(lambda x: own.layer(params, x, backend=backend))(x))
    told = own.explain(params, x, backend=backend, precision="float32")
    assert told.split(":")[0] == ("native" if "ffi_call" in program else "scan")
