"""What a person gives and gets: paths, fields, commands, tables and the words about a result."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags

import launch  # noqa: F401  which defines the flags
import seqmnist_jax
from configs import row_lstm
from configs.best import row_tcn
from seqmnist_jax.analysis import export, results_page, table
from seqmnist_jax.analysis.evaluate import evaluate
from seqmnist_jax.analysis.report import build, comparison
from seqmnist_jax.cli import commands, modes, text
from seqmnist_jax.cli import flags as cli_flags
from seqmnist_jax.data import cache
from seqmnist_jax.errors import SeqMnistError, UsageError
from seqmnist_jax.rnn.native import build as native_build
from seqmnist_jax.training import plan, sweep
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import train
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import Checkpoints
from seqmnist_jax.workdir.metrics import read_events
from tests.tiny import QUICK

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "row_lstm.py")
FIELDS = {"model.hidden_size": 4, "train.batch_size": 8, "train.steps": 20, "train.eval_every": 10}
SMALL = ["--config.data.source=embedded", *(f"--config.{field}={value}" for field, value in FIELDS.items())]


def config_of(**changes):
    config = row_lstm.get_config()
    config.update_from_flattened_dict({"data.source": "embedded", **FIELDS, **changes})
    return config


def start(*arguments, cwd, **options):
    environment = {name: value for name, value in os.environ.items() if name != "SEQMNIST_DATA_DIR"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment | QUICK, **options}
    command = [sys.executable, str(ROOT / "launch.py"), "--config", CONFIG, *SMALL, *arguments]
    return subprocess.Popen(command, cwd=cwd, text=True, **options)


@pytest.fixture
def parsed(monkeypatch):
    """Parses a command line, as launch.py does; the flags are as before afterwards."""

    def forget():
        for name in list(flags.FLAGS):
            if name.startswith("config."):
                delattr(flags.FLAGS, name)  # defined as a config is parsed
            else:
                flags.FLAGS[name].unparse()

    def parse(*arguments):
        argv = ["launch.py", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        forget()
        cli_flags.parse(argv)

    yield parse
    forget()


@pytest.fixture(scope="module")
def chosen_on_test(tmp_path_factory, cache_dir):
    folder = tmp_path_factory.mktemp("chosen") / "run"
    train(build_run(config_of(**{"data.selection": "test:128"})), folder, watch=QUIET)
    return folder


# Fields that nothing reads, names that are none.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.precision", "bfloat16"),
        ("model.norm", "batch"),
        ("model.bidirectional", True),
        ("model.dense_init", "orthogonal"),
        ("model.kernel_init", "orthogonal"),
        ("model.gate_bias", "chrono"),
        ("model.remat", 4),
        ("model.cell", "gru"),
        ("runtime.backend", "native"),
        ("runtime.eval_precision", "bfloat16"),
        ("optimizer.weight_decay", 0.1),
        ("optimizer.rmsprop_decay", 0.5),
    ],
)
def test_a_field_that_a_tcn_by_adam_does_not_read_is_refused(field, value):
    config = row_tcn.get_config()
    config.update_from_flattened_dict({"data.source": "embedded", field: value})
    with pytest.raises(UsageError, match=rf"^{field} is {value!r}.* it would change nothing; expected its default"):
        build_run(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.cell": "gru", "model.forget_bias": 2.0},
        {"model.gate_bias": "log_uniform", "model.forget_bias": 2.0},
        {"model.longest_time_scale": 100},
        {"model.kernel_size": 3},
        {"optimizer.warmup_steps": 7},
        {"optimizer.adam_beta1": 0.5},
    ],
)
def test_so_is_one_that_no_cell_schedule_or_rule_reads(changes):
    with pytest.raises(UsageError, match=f"{list(changes)[-1]} is .* would change nothing"):
        build_run(config_of(**changes))


def test_the_norm_of_no_clip_makes_no_other_run():
    by_file = build_run(config_of(**{"optimizer.clip.mask": "none"}))  # whose norm the config file has
    other = build_run(config_of(**{"optimizer.clip.mask": "none", "optimizer.clip.norm": 7.0}))
    assert by_file.identity == other.identity
    with pytest.raises(UsageError, match=r"optimizer\.clip\.norm is 7\.0"):
        build_run(
            config_of(**{"optimizer.clip.mask": "none", "optimizer.clip.norm": 7.0}), named=["optimizer.clip.norm"]
        )


def test_a_name_section_or_type_that_is_none_is_refused_with_the_nearest():
    config = config_of()
    config.model.hiden_size = 128
    with pytest.raises(UsageError, match=r"model\.hiden_size.*Did you mean 'model\.hidden_size'") as caught:
        build_run(config)
    assert caught.value.exit_code == 2
    config = config_of()
    config.optimiser = {"name": "sgd"}
    with pytest.raises(UsageError, match=r"optimiser\.name.*Did you mean 'optimizer\.name'"):
        build_run(config)
    config = config_of()
    with config.ignore_type():
        config.train.steps = "many"
    with pytest.raises(UsageError, match=r"train\.steps is 'many'"):
        build_run(config)
    del config.train["steps"]
    with pytest.raises(UsageError, match=r"lacks train\.steps"):
        build_run(config)


# Paths.


def test_what_is_there_comes_before_patterns(tmp_path):
    for name in ("run1", "run[1]", "a,b", "c"):
        (tmp_path / name).mkdir()
    assert files.matching(str(tmp_path / "run[1]")) == [tmp_path / "run[1]"]
    assert files.matching(str(tmp_path / "run[12]")) == [tmp_path / "run1"]


def test_paths_are_one_thing_through_all_flags(parsed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("seed=1,learning_rate=0.01", "c"):
        (tmp_path / name).mkdir()
    parsed("--mode=table", "--workdirs=~/seed=1,learning_rate=0.01,~/c,~/none*", "--workdir=~/r1")
    folder = str(tmp_path / "seed=1,learning_rate=0.01")
    assert cli_flags.given_folders() == [folder, str(tmp_path / "c"), str(tmp_path / "none*")]
    assert cli_flags.given_path("workdir") == tmp_path / "r1"
    many = [str(tmp_path / f"of-a-rather-long-name-{i}") for i in range(12)]
    parsed("--mode=table", f"--workdirs={','.join(many)}")
    assert cli_flags.given_folders() == many
    (tmp_path / "my run, v2").mkdir()
    parsed("--mode=table", f"--workdirs={tmp_path}/my run, v2,{tmp_path}/c")
    assert cli_flags.given_folders() == [str(tmp_path / "my run, v2"), str(tmp_path / "c")]
    parsed("--mode=table", "--workdirs=a", "--workdirs=b")
    with pytest.raises(UsageError, match="--workdirs is given several times"):
        cli_flags.given_folders()
    parsed("--workdir=")
    with pytest.raises(UsageError, match="--workdir is empty"):
        cli_flags.given_path("workdir")
    parsed("--mode=report", "--workdir=r\udcff")
    with pytest.raises(UsageError, match=r"--workdir is .* no UTF-8"):
        modes.report()
    parsed("--config", CONFIG, "--config.runtime.data_dir=~nobody-of-this-name/x")
    with pytest.raises(UsageError, match=r"runtime\.data_dir"):
        cli_flags.given_config()


def test_home_is_home_from_python_and_the_environment(chosen_on_test, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(chosen_on_test, tmp_path / "run")
    assert seqmnist_jax.load("~/run").step == seqmnist_jax.load(tmp_path / "run").step
    assert train(build_run(config_of(**{"data.selection": "test:128"})), Path("~/run"), watch=QUIET)["steps"] == 20
    monkeypatch.setenv("SEQMNIST_CACHE_DIR", "~/cache")
    assert cache.folder() == tmp_path / "cache"
    assert native_build._folder() == tmp_path / "cache" / "native"


def test_files_go_by_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600


# Commands.


def test_the_recorded_command_is_the_runs(parsed, tmp_path):
    flagfile = tmp_path / "flags"
    flagfile.write_text("--config.model.cell=gru\n--config.runtime.data_dir=/here\n")
    parsed("--config", CONFIG, "--config.seed", "5", f"--flagfile={flagfile}", "--noconfig.model.bidirectional")
    command = shlex.split(commands.of_this_run())
    assert command[:4] == ["python", "launch.py", "--config", CONFIG]
    assert set(command[4:]) == {"--config.seed=5", "--config.model.cell=gru", "--config.model.bidirectional=False"}
    parsed("--config", CONFIG, "--config.sweep={'data.permutation': (None, 'numpy:1')}", "--seeds=1-2")
    one = shlex.split(commands.of_this_run({"seed": 1, "data.permutation": None}))
    assert set(one[4:]) == {"--config.seed=1", "--config.data.permutation=None"}
    parsed(*one[2:])
    assert cli_flags.given_config().data.permutation is None
    for folder in (["--workdir", "old"], ["-workdir", "old"], ["--workdir=old"]):
        parsed("--config", CONFIG, *folder, "--seeds=1-2")
        assert shlex.split(commands.to_go_on(Path("new one")))[-4:] == [
            "--config",
            CONFIG,
            "--seeds=1-2",
            "--workdir=new one",
        ]


# Words about a result.


def test_every_mode_says_that_test_images_chose(chosen_on_test, tmp_path, monkeypatch):
    said = "chosen on test images (test:128)"
    summary = files.read_json(chosen_on_test / "summary.json")
    results = {
        "train": (summary, text.result(summary)),
        "evaluate": (found := evaluate(chosen_on_test), text.evaluation(found)),
        "export": (found := export.export(chosen_on_test), text.export(found)),
        "report": (build.gather([chosen_on_test])["run"], said),
    }
    rows = table.rows(table.find([str(chosen_on_test)]).results)
    results["table"] = (rows[0], results_page.as_markdown(rows))
    config = config_of(**{"data.selection": "test:128"})
    grid = plan.build_sweep(config, "1-2")
    ranking = sweep.train_sweep(grid, plan.build_points(config, grid), tmp_path, watch=QUIET)
    results["sweep"] = (ranking, text.sweep(ranking))
    for mode, (value, words) in results.items():
        assert any(said in warning for warning in value["warnings"]), mode
        assert any("NOT on MNIST" in warning for warning in value["warnings"]), mode
        assert said in words, mode
    assert ranking["datasets"] == ["mnist-5k (embedded)"]


def test_another_checkpoint_than_the_results_is_told(chosen_on_test, tmp_path):
    folder = shutil.copytree(chosen_on_test, tmp_path / "run")
    best = files.read_json(folder / "summary.json")["best_step"]
    shutil.rmtree(folder / "checkpoints" / str(best))
    exported = export.export(folder)
    assert exported["checkpoint_step"] != best
    assert exported["test_accuracy"] is None
    for result in (exported, evaluate(folder)):
        assert any(f"the result in the summary is that of checkpoint {best}" in one for one in result["warnings"])
    (folder / "summary.json").unlink()
    assert any("The run has not ended" in one for one in evaluate(folder)["warnings"])
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(seqmnist_jax.errors.SeqMnistError, match="no checkpoint yet"):
        evaluate(folder)


def test_nothing_is_best_by_validation_without_validation(tmp_path):
    folders = []
    for seed in (1, 2):
        folders.append(tmp_path / str(seed))
        summary = train(build_run(config_of(**{"data.split": "first:0", "seed": seed})), folders[-1], watch=QUIET)
    assert (summary["selected_on"], summary["best_step"], summary["validation_accuracy"]) == ("last", 20, None)
    assert summary["dataset"]["sizes"]["train"] == 4500
    assert "validation" not in {event["split"] for event in read_events(folders[-1])}
    found = build.gather(folders)["comparison"]
    assert found["best"] is None
    assert [run["mcnemar"] for run in found["runs"]] == [None, None]
    assert comparison.best([]) is None


# The table.


def copies(chosen_on_test, folder, *changes):
    for place, change in enumerate(changes):
        summary = files.read_json(chosen_on_test / "summary.json")
        (folder / str(place)).mkdir(parents=True)
        summary = {**summary, "seed": place, "identity": {**summary["identity"], "seed": place}}
        files.write_json(folder / str(place) / "summary.json", {**summary, **change})
    return str(folder)


def test_seeds_that_diverged_are_told(chosen_on_test, tmp_path):
    where = copies(chosen_on_test, tmp_path, {}, {})
    lost = tmp_path / "lost"
    lost.mkdir()
    summary = files.read_json(chosen_on_test / "summary.json")
    record = {name: summary[name] for name in ("identity", "steps")} | {"seed": 7}
    files.write_json(lost / "diverged.json", {"reason": "Training diverged at step 1", **record})
    results = table.find([where]).results
    (row,) = table.rows(results)
    assert (row["seeds"], row["diverged_seeds"]) == ([0, 1], [7])
    assert "1 of 3 runs diverged, and are in no mean." in row["warnings"]
    assert "| 0, 1; 7 diverged |" in results_page.as_markdown([row])
    with pytest.raises(UsageError, match=r"all runs found diverged: .*lost"):
        table.rows(table.find([str(lost)]).results)
    record["identity"]["optimizer.learning_rate"] = 1e30
    files.write_json(lost / "diverged.json", record)
    results = table.find([where]).results
    assert f"All seeds diverged, so there is no row. ({lost})" in results_page.as_markdown(
        table.rows(results), without_result=table.without_result(results)
    )


@pytest.mark.parametrize(
    "change",
    [{"test_accuracy": None}, {"parameters": "many"}, {"dataset": {}}, {"validation_accuracy": "high"}, {"steps": 1.5}],
)
def test_a_damaged_summary_is_named_by_its_folder(chosen_on_test, tmp_path, change):
    where = copies(chosen_on_test, tmp_path / "damaged", change)
    with pytest.raises(UsageError, match="damaged/0"):
        table.find([where])


def test_events_that_are_no_numbers_are_passed_over(chosen_on_test, tmp_path):
    where = copies(chosen_on_test, tmp_path, {})
    event = {"step": 10, "split": "validation", "seconds": 1.0, "accuracy": "high"}
    (tmp_path / "0" / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    assert table.rows(table.find([where]).results)[0]["seconds_to_90"] is None


@pytest.mark.parametrize("content", [b"Model,Pixels\nS4\n", b"Model\n\xff\n", b"Model\nS4,99\n"])
def test_published_figures_that_are_no_table(tmp_path, content):
    (tmp_path / "published.csv").write_bytes(content)
    with pytest.raises(UsageError, match=r"--published: .*published\.csv"):
        results_page.read_published(tmp_path / "published.csv")


def test_a_table_is_printed_where_its_file_can_not_be_written(chosen_on_test, parsed, tmp_path, capsys):
    parsed("--mode=table", f"--workdirs={chosen_on_test}", f"--csv={tmp_path / 'none' / 'table.csv'}")
    with pytest.raises(SeqMnistError, match=r"table\.csv can't be written"):
        modes.table()
    assert "| LSTM 4 |" in capsys.readouterr().out
    parsed("--mode=table", f"--workdirs={chosen_on_test}", f"--csv={tmp_path / 'table.csv'}")
    modes.table()
    with (tmp_path / "table.csv").open() as file:
        assert len(list(csv.reader(file))) == 2


# Beside a run that saves.


def test_models_are_read_while_their_checkpoints_are_deleted(chosen_on_test, tmp_path):
    folder = shutil.copytree(chosen_on_test, tmp_path / "run")
    run = build_run(config_of(**{"data.selection": "test:128"}))
    ended = threading.Event()

    def save():
        with Checkpoints(folder / "checkpoints") as checkpoints:
            last = checkpoints.last_step()
            parts, facts = checkpoints.restore(last, run.learner.template.shapes()), checkpoints.metadata(last)
            for step in range(21, 10_000):
                if ended.is_set():
                    return
                parts["training"]["step"] = np.int32(step)
                checkpoints.save(parts, facts, None)

    thread = threading.Thread(target=save)
    config = files.read_json(folder / "config.json")
    config["data"]["selection"] = "last"
    files.write_json(folder / "config.json", config)
    for name in ("data.json",):
        files.write_json(folder / name, {**files.read_json(folder / name), "selection": "last"})
    thread.start()
    failures, loaded = [], 0
    try:
        for _ in range(20):
            try:
                with pytest.raises(seqmnist_jax.errors.SeqMnistError, match="is not what checkpoint") as caught:
                    seqmnist_jax.load(folder)  # read whole, and then found to be chosen otherwise
                loaded += 1
            except Exception as e:
                failures.append(e)
    finally:
        ended.set()
        thread.join()
    assert (failures, loaded) == ([], 20), caught


# Whoever failed is named.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_ends_no_run(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(f"--workdir={tmp_path / 'run'}", cwd=tmp_path, stdout=full)
        _, errors = process.communicate(timeout=300)
    assert (process.returncode, (tmp_path / "run" / "summary.json").exists()) == (0, True), errors
    assert "standard output can't be written (No space left on device)" in errors
    assert "run can't be written" not in errors


@pytest.mark.slow
def test_a_reader_that_leaves_ends_no_run(tmp_path):
    process = start(f"--workdir={tmp_path / 'run'}", cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(timeout=300), (tmp_path / "run" / "summary.json").exists()) == (0, True), errors
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


@pytest.mark.slow
def test_a_sweep_by_an_executor_stops_and_goes_on(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed")
    arguments = [f"--workdir={tmp_path / 'sweep'}", "--seeds=1-2", "--config.runtime.executor=local"]
    slow = ["--config.train.steps=1000000", "--config.runtime.dispatch_seconds=0.05"]
    process = start(*arguments, *slow, cwd=tmp_path)
    folder = tmp_path / "sweep" / "replicas" / "seed=1" / "checkpoints"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir()):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Stopped 1 jobs; what they have done is saved." in errors
    assert "To go on:\n  " in errors
    assert f"--workdir={tmp_path / 'sweep'}" in errors
    # The folder is nobody's any more, and holds where the job stood.
    done = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    config = config_of(**{"train.steps": done + 10})
    grid = plan.build_sweep(config, "1-2")
    assert sweep.train_sweep(grid, plan.build_points(config, grid), tmp_path / "sweep", watch=QUIET)["diverged"] == []
