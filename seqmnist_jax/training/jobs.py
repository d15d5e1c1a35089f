"""Where the groups of a sweep run: here, or as jobs of a scheduler, by submitit (an extra)."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seqmnist_jax.errors import Interrupted, UsageError, parse_mapping
from seqmnist_jax.training.train import Stopped

Json = dict[str, Any]

# What config.runtime.executor may name beside '', this process.
EXECUTORS = ("local", "slurm")
# How often one looks whether jobs have ended, or are to be stopped.
LOOK_SECONDS = 0.5


class JobsFailed(Interrupted):
    """Some jobs of a sweep failed; the message names their logs."""


def parse_options(text: str) -> Json:
    """The parameters of submitit's executor from config.runtime.executor_options, as "{'timeout_min': 60}".

    Raises:
      UsageError: not a mapping from names.
    """
    options = parse_mapping(text, "runtime.executor_options", "{'timeout_min': 60, 'slurm_partition': 'gpu'}")
    if not all(isinstance(name, str) for name in options):
        raise UsageError(f"runtime.executor_options is {text!r}; expected names of submitit's parameters as keys.")
    return options


def make_executor(name: str, options: Json, folder: Path) -> Any:
    """Submitit's executor; None for this process.

    Args:
      name: 'local', jobs as processes of this machine; 'slurm'; or '', this process.
      options: its parameters.
      folder: for what jobs are given, give back and print; on a cluster all machines must see it.

    Raises:
      UsageError: submitit is not installed, there is no Slurm, or it knows no such parameter.
    """
    if not name:
        return None
    if name not in EXECUTORS:
        raise UsageError(f"runtime.executor is {name!r}; expected '', 'local' or 'slurm'.")
    try:
        import submitit
    except ImportError:
        raise UsageError(f"runtime.executor is {name!r}, which needs submitit: pip install submitit.") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=name)
        executor.update_parameters(**options)
    except (RuntimeError, TypeError, NameError, ValueError) as e:
        raise UsageError(f"runtime.executor is {name!r} with the options {options}: {e}") from e
    return executor


def run_jobs(
    executor: Any,
    work: Callable[..., None],
    jobs: Sequence[tuple[str, tuple[Any, ...]]],
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Submits jobs, and waits for all of them.

    Args:
      executor: as `make_executor` makes it.
      work: a function that the jobs can import.
      jobs: of each a name for people, and the arguments of `work`.
      should_stop: when true all jobs are asked to stop, which gives them time to save.

    Raises:
      JobsFailed: at least one failed, and the others are done all the same; or the executor refused one, and those
        before it are asked to stop.
      Stopped: `should_stop` said so, and all jobs have come to their end.
    """
    # Ctrl-C is for this process, which passes it on: a job on this machine would get it twice.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    submitted: list[tuple[str, Any]] = []
    try:
        for name, arguments in jobs:
            submitted.append((name, executor.submit(work, *arguments)))
    except RuntimeError as e:  # as submitit's of a scheduler that refuses one
        for _, job in submitted:
            _ask_to_stop(job, was_asked=False)
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise JobsFailed(
            f"The executor refuses {jobs[len(submitted)][0]}: {lines[-1]}. The {len(submitted)} jobs before it are "
            "asked to stop; the same command goes on with all of them."
        ) from e
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    was_asked = False
    while not all(job.done() for _, job in submitted):
        if should_stop():
            for _, job in submitted:
                _ask_to_stop(job, was_asked)
            was_asked = True
        time.sleep(LOOK_SECONDS)
    if was_asked:
        raise Stopped(f"Stopped {len(jobs)} jobs; what they have done is saved.")
    failed = []
    for name, job in submitted:
        error = job.exception()
        if error is not None:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            failed.append(f"{name}: {lines[-1]}\n    log: {job.paths.stderr}")
    if failed:
        raise JobsFailed(
            f"{len(failed)} of {len(jobs)} jobs failed; the same command runs them again, and them alone:\n  "
            + "\n  ".join(failed)
        )


def _ask_to_stop(job: Any, was_asked: bool) -> None:
    """Asks a job to save and stop: a process of this machine again and again, because at its start it does not hear."""
    process = getattr(job, "_process", None)
    if process is not None:  # submitit's own way kills it after a second
        process.send_signal(signal.SIGTERM)
    elif not was_asked:
        job.cancel()
