"""Where the groups of a sweep run: here, or as jobs of a scheduler, by submitit (an extra)."""

import itertools
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from seqmnist_jax.errors import Interrupted, UsageError, parse_mapping
from seqmnist_jax.training.train import Stopped

# What config.runtime.executor may name beside '', this process.
EXECUTORS = ("local", "slurm")
# A job of this machine has no end: submitit's own is after two minutes.
A_YEAR = 365 * 24 * 60
# How often one looks whether jobs have ended, or are to be stopped.
LOOK_SECONDS = 0.5


class JobsFailed(Interrupted):
    """Some jobs of a sweep failed; the message names their logs."""


def make_executor(name: str, options: str, folder: Path) -> Any:
    """Submitit's executor; None for this process.

    Args:
      name: 'local', jobs as processes on this machine's CPUs; 'slurm'; or '', this process.
      options: its parameters, as "{'timeout_min': 60}".
      folder: for what jobs are given, give back and print; on a cluster all machines must see it.

    Raises:
      UsageError: submitit is not installed, there is no Slurm, it takes no such parameter, a job of Slurm has no time
        limit, or a local one would leave this process's GPU alone.
    """
    parameters = parse_mapping(options, "runtime.executor_options", "{'timeout_min': 60, 'slurm_partition': 'gpu'}")
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
        executor.update_parameters(**({"timeout_min": A_YEAR} if name == "local" else {}) | parameters)
    except (RuntimeError, TypeError, NameError, ValueError, AssertionError) as e:
        raise UsageError(f"runtime.executor is {name!r} with runtime.executor_options {parameters}: {e}") from e
    if name == "slurm" and not parameters.keys() & {"timeout_min", "slurm_time"}:
        raise UsageError(
            "runtime.executor is 'slurm', whose jobs submitit lets run for 5 minutes; expected in "
            "runtime.executor_options how long one may take, in minutes, as {'timeout_min': 120}."
        )
    device = jax.default_backend().upper()
    if name == "local" and device != "CPU":
        raise UsageError(
            f"runtime.executor is 'local', whose jobs all run at once and would share or miss this {device}; expected "
            "'', and the groups train on it one after another. For jobs on CPUs set JAX_PLATFORMS=cpu."
        )
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
    # Ctrl-C and a closed terminal are for this process, which passes them on: a job on this machine would get them too.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
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
            failed.append(f"{name}: {_reason(error)}\n    log: {job.paths.stderr}")
    if failed:
        raise JobsFailed(
            f"{len(failed)} of {len(jobs)} jobs did not finish; the same command goes on with them, and them alone:\n  "
            + "\n  ".join(failed)
        )


def _reason(error: BaseException) -> str:
    """What a job's process raised: the end of the traceback that submitit puts between two lines."""
    text = str(error).strip() or type(error).__name__
    found = re.search(r"^-+\n(.*)\n-+\nYou can check", text, re.DOTALL | re.MULTILINE)
    told = found[1] if found else text
    lines = re.sub(r"\n-+\nFor simplicity, JAX has removed .*", "", told).strip().splitlines()
    frames = [place for place, line in enumerate(lines) if line.startswith('  File "')]
    raised = itertools.dropwhile(lambda line: line.startswith(" "), lines[frames[-1] if frames else -1 :])
    return "\n    ".join(raised)


def _ask_to_stop(job: Any, was_asked: bool) -> None:
    """Asks a job to save and stop: a process of this machine again and again, because at its start it does not hear."""
    process = getattr(job, "_process", None)
    if process is not None:  # submitit's own way kills it after a second
        process.send_signal(signal.SIGTERM)
    elif not was_asked:
        job.cancel()
