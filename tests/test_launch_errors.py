"""Requests that can't be met: one readable message, an exit code, and nothing written."""

import json
import math
import os
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import seqmnist_jax
from configs import row_lstm
from seqmnist_jax.analysis.evaluate import evaluate
from seqmnist_jax.data.idx import DataError, write_idx
from seqmnist_jax.data.sources import FILES
from seqmnist_jax.errors import SeqMnistError, UsageError, choose, did_you_mean
from seqmnist_jax.training.run import build_run
from seqmnist_jax.workdir.files import WorkdirError
from tests import launching, tiny

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "row_lstm.py")

# Through the command line, each in a process of its own; what the builders refuse is tested below, without one.


@pytest.fixture
def launch(tmp_path):
    """Runs launch.py from an empty folder; afterwards that folder must still be empty and the workdir absent."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    workdir = tmp_path / "workdir"

    def run(*arguments, cwd=cwd, **changes):
        environment = {name: value for name, value in os.environ.items() if name != "SEQMNIST_DATA_DIR"} | changes
        return launching.launch([a.format(workdir=workdir, tmp=tmp_path) for a in arguments], cwd, environment)

    yield run
    assert list(cwd.iterdir()) == []
    assert not workdir.exists()


def message_of(done, exit_code):
    """The one message of a failed launch, which must have no traceback and print no result."""
    assert "Traceback" not in done.stderr
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return message


@pytest.mark.parametrize(
    ("arguments", "exit_code", "expected"),
    [
        pytest.param(
            ["--config", CONFIG, "--workdir={workdir}", "--config.model.hiden_size=3"],
            2,
            ["--config.model.hiden_size", "Did you mean 'model.hidden_size'?"],
            id="misspelt field",
        ),
        pytest.param(
            [f"--config={CONFIG}", "--config.train.steps=many", "--workdir={workdir}"],
            2,
            ["--config.train.steps=many", "expected a whole number"],
            id="not an integer",
        ),
        pytest.param(
            ["--config", CONFIG, "--wrkdir={workdir}"], 2, ["wrkdir", "Did you mean", "workdir"], id="unknown flag"
        ),
        pytest.param(
            ["--config", CONFIG, "--lr=3"], 2, ["--lr", "'--config.optimizer.learning_rate'"], id="lr for a field"
        ),
        pytest.param(
            ["--config", CONFIG, "--train.steps=100"], 2, ["'--config.train.steps'"], id="field without its prefix"
        ),
        pytest.param(["--seed=3"], 2, ["Did you mean '--config.seed'?"], id="field, and no config"),
        pytest.param(["--mode=eval", "--workdir={tmp}"], 2, ["Did you mean 'evaluate'?"], id="mode cut short"),
        pytest.param(
            ["--config", CONFIG, "--config.optimizer.lr=3"], 2, ["'optimizer.learning_rate'"], id="lr in a field"
        ),
        pytest.param(
            ["--config", CONFIG, "--workdir={workdir}", "--config.data.permuted"],
            2,
            ["--config.data.permuted=true"],
            id="boolean without a value",
        ),
        pytest.param(
            ["--config", CONFIG, "--config.model.hidden_size=0"],
            2,
            ["model.hidden_size is 0", "expected 1 to"],
            id="impossible value",
        ),
        pytest.param(
            ["--config", CONFIG, "--workdir={workdir}", "--config.runtime.data_dir={tmp}/absent"],
            1,
            ["absent is not a folder", "SEQMNIST_DATA_DIR"],
            id="no data folder",
        ),
        pytest.param(["--mode=train"], 2, ["--config", "configs/row_lstm.py"], id="train without a config"),
        pytest.param(["--mode=evaluate"], 2, ["--workdir"], id="evaluate without a workdir"),
        pytest.param(["--mode=evaluate", "--workdir={tmp}/cwd"], 1, ["cwd", "work directory"], id="evaluate nothing"),
        pytest.param(["--config", CONFIG, "train"], 2, ["'train'"], id="stray argument"),
    ],
)
def test_bad_request_ends_in_one_message(launch, arguments, exit_code, expected):
    message = message_of(launch(*arguments), exit_code)
    for words in expected:
        assert words in message


def test_missing_config_names_the_nearest(launch):
    message = message_of(launch("--config", "configs/row_lstn.py", "--workdir={workdir}", cwd=ROOT), 2)
    assert "configs/row_lstn.py" in message
    assert "Did you mean 'configs/row_lstm.py'?" in message


def test_config_that_takes_no_argument_is_refused_in_one_message(launch):
    message = message_of(launch("--config", f"{CONFIG}:small", "--workdir={workdir}"), 2)
    assert "row_lstm.py" in message


def test_config_that_lacks_fields_is_refused_in_one_message(launch, tmp_path):
    foreign = tmp_path / "foreign.py"
    foreign.write_text(
        "import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({'seed': 0})\n"
    )
    message_of(launch("--config", str(foreign), "--workdir={workdir}"), 2)


def test_debug_shows_the_traceback(launch):
    done = launch("--config", CONFIG, "--config.model.hidden_size=0", "--workdir={workdir}", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "model.hidden_size is 0" in done.stderr


def test_describe_prints_one_json_object_and_writes_nothing(launch):
    config = str(ROOT / "configs" / "permuted_gru.py")
    done = launch(
        "--mode=describe", "--json", "--config", config, "--workdir={workdir}", "--config.train.batch_size=40"
    )
    assert done.returncode == 0, done.stderr
    description = json.loads(done.stdout)
    assert description["config"]["train"]["batch_size"] == 40
    assert description["config"]["data"]["permutation"] == "numpy:100"
    assert description["config"]["model"]["cell"] == "gru"
    assert description["overridden"] == ["train.batch_size"]
    assert description["permutation"] == np.random.RandomState(100).permutation(784).tolist()
    assert description["shapes"] == {"input": [40, 784, 1], "logits": [40, 10]}
    assert description["data"]["name"] == "mnist-5k"
    assert description["data"]["sizes"] == {"train": 4000, "validation": 500, "test": 500}
    assert description["data"]["warning"]
    assert description["steps_per_epoch"] == 100
    # A reset-after GRU of 128 units on one feature has 3 (1 + 128 + 2) 128 parameters, the dense layer 129 * 10.
    assert description["parameter_count"] == 3 * 131 * 128 + 1290
    assert sum(row["size"] for row in description["parameters"]) == description["parameter_count"]


def test_describe_knows_the_sweep_and_the_folder(launch, tmp_path):
    def described(*more):
        done = launch("--mode=describe", "--json", "--config", CONFIG, *more)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["runs"], found["workdir"]

    swept = "--config.sweep={{'model.hidden_size': (8, 16)}}"
    assert described() == ([], None)
    assert described(swept, "--workdir={workdir}") == (["hidden_size=8", "hidden_size=16"], "new")
    (tmp_path / "metrics.jsonl").touch()
    for more in ((), (swept,)):  # as training would be
        message = message_of(launch("--mode=describe", "--config", CONFIG, *more, f"--workdir={tmp_path}"), 1)
        assert "choose another --workdir" in message.lower()


# In this process: what a config may not hold.


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds a run on the embedded digits with these fields changed, from an empty folder that must stay empty."""
    monkeypatch.delenv("SEQMNIST_DATA_DIR", raising=False)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)

    def with_fields(**fields):
        config = row_lstm.get_config()
        config.update_from_flattened_dict(fields)
        return build_run(config)

    yield with_fields
    assert list(cwd.iterdir()) == []


NAMES = [
    "data.source",
    "data.view",
    "data.protocol",
    "data.permutation",
    "data.split",
    "data.scaling",
    "data.selection",
    "model.cell",
    "model.kernel_init",
    "model.gate_bias",
    "model.norm",
    "model.dense_init",
    "optimizer.name",
    "optimizer.schedule",
    "optimizer.clip.mask",
    "optimizer.clip.unit",
]


@pytest.mark.parametrize("name", ["nonsense", ""])
@pytest.mark.parametrize("field", NAMES)
def test_unknown_name_is_refused_by_field(build, field, name):
    with pytest.raises(UsageError) as caught:
        build(**{field: name})
    assert caught.value.exit_code == 2
    assert f"{field} is {name!r}" in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "name", "nearest"),
    [
        ("model.cell", "lstmm", "lstm"),
        ("model.gate_bias", "loguniform", "log_uniform"),
        ("optimizer.name", "rmsporp", "rmsprop"),
        ("optimizer.clip.mask", "recurent", "recurrent"),
        ("optimizer.schedule", "warmup-cosine", "warmup_cosine"),
        ("data.source", "embeded", "embedded"),
        ("data.selection", "valid", "validation"),
    ],
)
def test_misspelt_name_is_answered_with_the_nearest(build, field, name, nearest):
    with pytest.raises(UsageError, match=f"Did you mean '{nearest}'"):
        build(**{field: name})


FROM_ONE = ["train.batch_size", "train.steps", "train.eval_every", "runtime.eval_batch_size", "model.hidden_size"]
RATES = ["optimizer.rmsprop_decay", "optimizer.adam_beta1", "optimizer.adam_beta2"]
NOT_NEGATIVE = [
    "optimizer.learning_rate",
    "optimizer.rmsprop_epsilon",
    "optimizer.adam_epsilon",
    "optimizer.rmsprop_initial_mean_square",
]
FLOATS = [*RATES, *NOT_NEGATIVE, "optimizer.clip.norm", "runtime.dispatch_seconds", "model.forget_bias"]

IMPOSSIBLE = [
    *((field, value) for field in FROM_ONE for value in (0, -1, -(2**40))),
    *((field, value) for field in RATES for value in (-0.1, 1.0, 1.5)),
    *((field, -1e-9) for field in NOT_NEGATIVE),
    *((field, value) for field in FLOATS for value in (math.nan, math.inf, -math.inf)),
    *((field, value) for field in ("optimizer.clip.norm", "runtime.dispatch_seconds") for value in (0.0, -1.0)),
    # More than float32 holds, so infinite where it is used.
    ("optimizer.learning_rate", 1e39),
    ("optimizer.clip.norm", 1e39),
    # Less than float32 holds, so zero where it is used.
    ("optimizer.clip.norm", 1e-60),
    # One, when rounded to float32.
    ("optimizer.adam_beta2", 1 - 1e-12),
    ("runtime.checkpoint_every", -1),
    ("seed", -1),
    ("seed", 2**31),
    ("data.permutation", "numpy:-1"),
    ("data.permutation", f"numpy:{2**32}"),
    ("data.permutation", "numpy:1.0"),
    ("data.split", "first:-1"),
    ("data.split", "first:10%"),
    # The embedded digits have 4,500 training images; at least one must train.
    ("data.split", "first:4500"),
    ("data.split", "first:5000"),
    ("train.batch_size", 4001),
]


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE)
def test_impossible_value_is_refused_by_field(build, field, value):
    with pytest.raises(UsageError) as caught:
        build(**{field: value})
    assert caught.value.exit_code == 2
    assert f"{field} is {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer.warmup_steps", -1),
        ("optimizer.final_fraction", -0.01),
        ("optimizer.final_fraction", 1.01),
        ("optimizer.final_fraction", math.nan),
        ("optimizer.final_fraction", math.inf),
    ],
)
def test_impossible_schedule_is_refused_by_field(build, field, value):
    with pytest.raises(UsageError, match=f"^{field} is {value}"):
        build(**{"optimizer.schedule": "warmup_cosine", field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.batch_size", 4000),
        ("train.batch_size", 1),
        ("seed", 2**31 - 1),
        ("data.split", "first:0"),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.rmsprop_decay", 0.0),
        ("optimizer.rmsprop_epsilon", 0.0),
        ("data.permutation", f"numpy:{2**32 - 1}"),
        ("model.hidden_size", 1),
    ],
)
def test_values_at_the_edge_are_taken(build, field, value):
    run = build(**{field: value})
    stored = run.config
    for name in field.split("."):
        stored = stored[name]
    assert stored == value


CONFIGS = sorted(path.relative_to(ROOT / "configs") for path in ROOT.glob("configs/**/*.py"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_hundred_steps_of_any_config_are_a_trial(path, monkeypatch):
    monkeypatch.delenv("SEQMNIST_DATA_DIR", raising=False)
    config = runpy.run_path(str(ROOT / "configs" / path))["get_config"]()
    config.data.source, config.data.name, config.train.steps = "embedded", "mnist", 100
    run = build_run(config, named=["train.steps"])
    has_room = config.optimizer.schedule != "warmup_cosine" or config.optimizer.warmup_steps < 100
    assert bool(run.remark) != has_room
    assert has_room or run.config["optimizer"]["warmup_steps"] == run.identity["optimizer.warmup_steps"] == 10
    # What fits stays, so that runs of before go on.
    config.train.steps = config.optimizer.warmup_steps + 1
    assert build_run(config).remark == ""


def test_a_warmup_that_is_named_is_no_other(build):
    config = row_lstm.get_config()
    config.optimizer.schedule, config.optimizer.warmup_steps = "warmup_cosine", config.train.steps
    with pytest.raises(UsageError, match=r"optimizer\.warmup_steps is 5000; expected 0 to train\.steps - 1"):
        build_run(config, named=["optimizer.warmup_steps"])


def test_a_cell_that_one_unit_can_t_make_is_refused(build):
    with pytest.raises(
        UsageError, match=r"^model.cell is 'exp_rnn', but its hidden_size is 1; expected at least 2 units"
    ):
        build(**{"model.cell": "exp_rnn", "model.hidden_size": 1})


def test_training_in_64_bits_is_refused(build):
    with jax.enable_x64(True), pytest.raises(UsageError, match=r"^JAX_ENABLE_X64 is on; expected it off"):
        build()


def test_idx_source_without_a_folder_is_a_data_error(build):
    with pytest.raises(DataError, match="SEQMNIST_DATA_DIR"):
        build(**{"data.source": "idx"})


@pytest.fixture
def flat_digits(tmp_path):
    """A folder of images one row high."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for stem, dimensions in FILES.values():
        write_idx(folder / stem, np.zeros((6, 1, 9) if dimensions == 3 else 6, np.uint8))
    return {"runtime.data_dir": str(folder), "data.split": "first:2", "train.batch_size": 2}


def test_data_too_small_for_the_split_are_refused(build, flat_digits):
    with pytest.raises(UsageError, match=r"data\.split is 'first:5000'.* 6 training images"):
        build(**{**flat_digits, "data.split": "first:5000"})


def test_time_scales_of_a_one_step_sequence_are_refused_by_field(build, flat_digits):
    assert build(**flat_digits).task.view.sequence_length == 1
    with pytest.raises(UsageError, match=r"model\.gate_bias"):
        build(**{**flat_digits, "model.gate_bias": "log_uniform"})


# Devices that are not there, and folders that are a run's own.


@pytest.mark.parametrize("platform", ["cuda", "no_such"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", CONFIG, "--workdir={workdir}"],
        ["--mode=describe", "--config", CONFIG],
        ["--mode=evaluate", f"--workdir={ROOT / 'pretrained' / 'row_lstm'}", "--split=validation"],
    ],
    ids=["train", "describe", "evaluate"],
)
def test_a_platform_that_is_not_here(launch, arguments, platform):
    done = launch(*arguments, JAX_PLATFORMS=platform)
    assert f"JAX_PLATFORMS is '{platform}'" in message_of(done, 1)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["1e3", "32.0", ""])
def test_numbers_that_are_not_whole(launch, value):
    message = message_of(launch("--config", CONFIG, "--workdir={workdir}", f"--config.train.steps={value}"), 2)
    assert message == f"error: flag --config.train.steps={value}: expected a whole number, in digits."


@pytest.fixture
def inside(tiny_run, tmp_path):
    """A checkpoint's folder."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run[0], run)
    return next(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def test_a_run_is_not_begun_among_the_checkpoints_of_another(inside):
    before = sorted(inside.rglob("*"))
    for place in (inside, inside.parent, inside.parent / "new", inside / "below"):
        with pytest.raises(UsageError, match="among the checkpoints") as caught:
            tiny.train(place)
        assert f"Name the run, {inside.parents[1]}," in str(caught.value)
    assert sorted(inside.rglob("*")) == before


def test_the_run_around_what_is_none_is_named(inside):
    run = inside.parents[1]
    for place in (inside, inside.parent, run / "summary.json"):
        for read in (evaluate, seqmnist_jax.load):
            with pytest.raises(WorkdirError, match="does not exist; expected a work directory") as caught:
                read(place)
            assert str(caught.value).endswith(f" Did you mean {run}?")
    tiny.train(run / "below")  # a run's folder may lie in another's


# Evaluation of what is no run.


def test_unknown_split_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match=r"--split is 'tests'.*train, validation, test"):
        evaluate(tmp_path / "absent", split="tests")


@pytest.mark.parametrize("config", ["", "{", "[1]", "7", "{}"])
def test_folder_with_a_foreign_config_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(SeqMnistError) as caught:
        evaluate(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "data.json"]


# The messages' parts.


def test_choose_names_the_field_the_value_and_the_choices():
    assert choose({"a": 1}, "a", "x.y") == 1
    with pytest.raises(UsageError) as caught:
        choose({"beta": 1, "alpha": 2}, "alhpa", "x.y")
    assert str(caught.value) == "x.y is 'alhpa'; expected one of: alpha, beta. Did you mean 'alpha'?"


def test_nothing_is_suggested_where_nothing_is_near():
    assert did_you_mean("zzz", ["alpha", "beta"]) == ""
    assert did_you_mean("alpha", []) == ""
