"""What a folder is to a run, decided before anything is written in it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seqmnist_jax.data.protocols import FIELDS
from seqmnist_jax.errors import Interrupted, UsageError
from seqmnist_jax.training.run import Run
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import saved_steps

# What a folder may be to a run.
NEW, BEGUN, FINISHED, DIVERGED = "new", "begun", "finished", "diverged"
GOING = (NEW, BEGUN)
# The files by which a folder is known to hold a run, whatever else is lost.
LEFT_BY_RUNS = (files.CHECKPOINTS, files.SUMMARY, files.PREDICTIONS, files.METRICS, files.DIVERGED)


@contextmanager
def explaining_full_disk(workdirs: Sequence[Path]) -> Iterator[None]:
    """Says what a failure to write means for the runs, where it is one of their folders that fails."""
    try:
        yield
    except OSError as e:
        where = Path(e.filename if isinstance(e.filename, str) else workdirs[0]).absolute()
        if isinstance(e, BrokenPipeError) or not any(where.is_relative_to(folder.absolute()) for folder in workdirs):
            raise
        raise Interrupted(
            f"{where} can't be written ({e.strerror or e}). What was saved before is whole: mend that, and the same "
            "command resumes from the last checkpoint."
        ) from e


def check_folder(workdir: Path) -> None:
    """Checks that this is, or can be made, a folder for a run or a sweep.

    Raises:
      UsageError: it is a file, or lies among a run's checkpoints.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"{workdir} is a file; expected a folder, or a name for a new one. Choose another --workdir.")
    around = files.run_around(workdir)
    if around and files.CHECKPOINTS in workdir.absolute().relative_to(around).parts:
        raise UsageError(
            f"{workdir} is among the checkpoints of a run. Name the run, {around}, or choose another --workdir."
        )


def look(run: Run, workdir: Path) -> str:
    """What a folder is to a run, found without writing anything.

    Returns:
      NEW where there is no run yet; BEGUN where this one can go on; FINISHED where the result of so many steps is
      there, with checkpoints or without; DIVERGED where it ended so.

    Raises:
      WorkdirError: it holds something else, or what can't be gone on with; the message says what.
      UsageError: as `check_folder`; or the run has done more steps.
    """
    check_folder(workdir)
    if (workdir / files.SWEEP).exists():
        raise files.WorkdirError(
            f"{workdir} holds a sweep, not one run. Give its --seeds or config.sweep to go on with it, name one of its "
            f"runs, in {workdir / files.REPLICAS}, or choose another --workdir."
        )
    summary, diverged = (
        files.read_json(workdir / name) if (workdir / name).exists() else {} for name in (files.SUMMARY, files.DIVERGED)
    )
    if (workdir / files.CONFIG).exists():
        old = configs.from_json(files.read_config(workdir))
        facts = files.read_facts(workdir)
        identity = configs.identity(old, facts["content_hash"])
        is_named = facts["source"] == "idx" and old.runtime.data_dir
        data = f"the files in {old.runtime.data_dir}" if is_named else f"{facts['name']} ({facts['source']})"
        check_identity(run, identity, facts, str(workdir), data)
    elif isinstance(summary.get("identity"), dict):  # of which only the results were kept
        check_identity(run, configs.completed(summary["identity"]), summary["dataset"], str(workdir))
    elif left := [name for name in LEFT_BY_RUNS if (workdir / name).exists()]:
        raise files.WorkdirError(
            f"{workdir} has {left[0]} but no {files.CONFIG}, so it can't be told whose that is. "
            "Put the file back, or choose another --workdir."
        )
    else:
        return NEW
    saved = saved_steps(workdir / files.CHECKPOINTS)
    done = max([summary.get("steps", 0), diverged.get("step", 1) - 1, *saved])  # the step of a divergence is not taken
    if done > run.steps:
        raise UsageError(f"{workdir} has done {done} steps already, but train.steps is {run.steps}.")
    is_trial = files.has_trials(workdir.absolute().parent.parent) or (summary and "test_accuracy" not in summary)
    if run.tests and is_trial:
        raise files.WorkdirError(f"{workdir} holds a trial, whose test images are not read. Choose another --workdir.")
    if summary.get("steps") == run.steps:
        return FINISHED
    if diverged:
        return DIVERGED
    if not saved:
        check_result_stays(run, workdir)
    return BEGUN


def check_result_stays(run: Run, workdir: Path) -> None:
    """Raises `WorkdirError` where there is a result, which a run that has no checkpoint to go on from would lose."""
    if (workdir / files.SUMMARY).exists():
        summary = files.read_json(workdir / files.SUMMARY, needed=("steps",))
        raise files.WorkdirError(
            f"{workdir} has the result of {summary['steps']} steps, but no checkpoint from which it could go on to "
            f"{run.steps}, and would lose that. Choose another --workdir."
        )


def check_identity(
    run: Run, identity: configs.FlatConfig, facts: dict[str, Any], where: str, data: str = "other data"
) -> None:
    """Raises `WorkdirError` where this is not the run's identity; `data` is what that run read, in words.

    Nor is it the run's where its protocol was another one then, of which `facts`, as of `Task.facts`, tell.
    """
    differing = configs.differences(identity, run.identity)
    if not differing:
        told = [name for name in FIELDS if name in facts]
        parts = ({f"data.{name}": one[name] for name in told} for one in (facts, run.task.facts()))
        differing = configs.differences(*parts)
    if not differing:
        return
    mends = ["Give the old values to resume it, or another --workdir for a new run."]
    if identity.get(configs.CONTENT) != run.identity[configs.CONTENT]:
        now = run.task.dataset
        mends += [
            f"That run read {data}; this command reads {now.name} ({now.source}). A folder is named by "
            "SEQMNIST_DATA_DIR or --config.runtime.data_dir."
        ]
    if identity.get(configs.CELL_CONTENT) != run.identity.get(configs.CELL_CONTENT):
        mends += ["The file of its cell has changed since: it would be another network. Restore the file to resume."]
    raise files.WorkdirError(
        "\n".join([f"{where} holds another run; it differs in", *(f"  {line}" for line in differing), *mends])
    )
