"""Groups of a sweep as jobs of submitit's local executor: results, restarts, failures with their logs, bad requests."""

import json
from types import SimpleNamespace

import pytest

from configs import row_lstm
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training import jobs, plan, sweep
from seqmnist_jax.training.replicas import QUIET, Watch
from seqmnist_jax.workdir.lock import owned
from tests.tiny import QUICK


def build(**changes):
    config = row_lstm.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "embedded",
            "train.batch_size": 16,
            "train.steps": 20,
            "train.eval_every": 10,
            "sweep": "{'model.hidden_size': (4, 5)}",
            **changes,
        }
    )
    swept = plan.build_sweep(config, "1-2")
    return swept, plan.build_points(config, swept)


def run_local(folder, built):
    pytest.importorskip("submitit", reason="submitit is not installed")
    lines = []
    executor = jobs.make_executor("local", {"timeout_min": 5}, folder / "jobs")
    return sweep.train_sweep(*built, folder, executor=executor, watch=Watch(say=lines.append)), lines


@pytest.mark.slow
def test_groups_run_as_jobs_and_failed_ones_again(tmp_path, monkeypatch, quick_compiler):
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)  # for the jobs
    built = build()
    # The folder of one run is in use, so its group fails.
    broken = tmp_path / "replicas" / "seed=1,hidden_size=5"
    broken.mkdir(parents=True)
    failed = pytest.raises(jobs.JobsFailed, match=r"1 of 2 jobs failed.*\n  .*hidden_size=5.*\n    log: .*\.err")
    with owned(broken), failed:
        run_local(tmp_path, built)
    assert (tmp_path / "replicas" / "seed=2,hidden_size=4" / "summary.json").exists()

    summary, lines = run_local(tmp_path, built)
    assert any("1 of 2 groups go to the executor" in line for line in lines)
    assert sorted(entry["changes"]["model.hidden_size"] for entry in summary["ranking"]) == [4, 5]

    here = sweep.train_sweep(*built, tmp_path / "here", watch=QUIET)
    assert [entry["test"] for entry in here["ranking"]] == [entry["test"] for entry in summary["ranking"]]
    stored = json.loads((tmp_path / "replicas" / "seed=2,hidden_size=5" / "summary.json").read_text())
    assert stored["replicas"] == 2


@pytest.mark.parametrize("text", ["{1: 2}", "[1]", "{'a':", "timeout_min=3"])
def test_impossible_options(text):
    with pytest.raises(UsageError, match=r"runtime\.executor_options"):
        jobs.parse_options(text)


def test_unknown_executors_and_parameters(tmp_path):
    with pytest.raises(UsageError, match="expected '', 'local' or 'slurm'"):
        jobs.make_executor("sge", {}, tmp_path)
    pytest.importorskip("submitit", reason="submitit is not installed")
    with pytest.raises(UsageError, match="timeout_minutes"):
        jobs.make_executor("local", {"timeout_minutes": 3}, tmp_path)


def test_a_job_that_is_refused_ends_those_before_it():
    cancelled = []

    class Executor:
        def submit(self, work, name):
            if name == "c":
                raise RuntimeError("Batch job submission failed:\ninvalid partition specified: nope")
            return SimpleNamespace(cancel=lambda: cancelled.append(name))

    with pytest.raises(
        jobs.JobsFailed, match=r"refuses c: invalid partition .* The 2 jobs before it are asked to stop"
    ):
        jobs.run_jobs(Executor(), print, [(name, (name,)) for name in "abcd"])
    assert cancelled == ["a", "b"]


def test_slurm_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"runtime\.executor is 'slurm'"):
        jobs.make_executor("slurm", {}, tmp_path)
