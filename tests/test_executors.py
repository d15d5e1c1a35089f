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
    executor = jobs.make_executor("local", "{'timeout_min': 5}", folder / "jobs")
    return sweep.train_sweep(*built, folder, executor=executor, watch=Watch(say=lines.append)), lines


@pytest.mark.slow
def test_groups_run_as_jobs_and_failed_ones_again(tmp_path, monkeypatch, quick_compiler):
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)  # for the jobs
    built = build()
    # The folder of one run is in use, so its group fails.
    broken = tmp_path / "replicas" / "seed=1,hidden_size=5"
    broken.mkdir(parents=True)
    failed = pytest.raises(
        jobs.JobsFailed,
        match=r"1 of 2 jobs did not finish.*\n  .*hidden_size=5: .*is in use by process \d+.*\n    log: .*\.err",
    )
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


@pytest.mark.parametrize("text", ["[1]", "{'a':", "timeout_min=3"])
def test_what_is_no_mapping(text, tmp_path):
    with pytest.raises(UsageError, match=r"runtime\.executor_options"):
        jobs.make_executor("local", text, tmp_path)


def test_unknown_executors(tmp_path):
    with pytest.raises(UsageError, match="expected '', 'local' or 'slurm'"):
        jobs.make_executor("sge", "", tmp_path)


@pytest.mark.parametrize("text", ["{'timeout_minutes': 3}", "{'timeout_min': '3'}", "{1: 2}"])
def test_parameters_that_submitit_does_not_take(text, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed")
    with pytest.raises(UsageError, match=r"'local' with runtime\.executor_options \{"):
        jobs.make_executor("local", text, tmp_path)


def test_a_local_job_has_no_end_of_its_own_and_a_gpu_is_not_left_alone(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    executor = jobs.make_executor("local", "", tmp_path)
    assert executor._executor.parameters["timeout_min"] > 10_000  # submitit's is 2
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    with pytest.raises(UsageError, match=r"share or miss this GPU; .* JAX_PLATFORMS=cpu"):
        jobs.make_executor("local", "", tmp_path)


def test_what_a_failed_job_says():
    submitits = pytest.importorskip("submitit.core.utils", reason="submitit is not installed").FailedJobError
    trace = """Traceback (most recent call last):
  File "a.py", line 1, in work
    first()
KeyError: 'a'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in work
    second(
seqmnist_jax.errors.TooLarge: The step needs
more than there is.
"""
    rule = "----------------------"
    note = "--------------------\nFor simplicity, JAX has removed its internal frames from the traceback.\n"
    trace = trace.replace("\nDuring", f"{note}\nDuring") + note
    text = f"Job (task=0) failed with trace:\n{rule}\n{trace}\n{rule}\nYou can check full logs or at paths:\n  - x.err"
    said = "seqmnist_jax.errors.TooLarge: The step needs\n    more than there is."
    assert jobs._reason(submitits(text)) == said
    assert (
        jobs._reason(submitits("Job 3 (task: 0) with path x\nhas not produced any output"))
        == "has not produced any output"
    )


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
        jobs.make_executor("slurm", "", tmp_path)
