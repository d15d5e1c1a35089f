"""Training: from a run to a work directory with a result. Read it top to bottom."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax
import ml_collections
import numpy as np

from seqmnist_jax import config as configs
from seqmnist_jax import provenance, steps
from seqmnist_jax import workdir as files
from seqmnist_jax.checkpoints import Checkpoints
from seqmnist_jax.clock import Clock, Progress
from seqmnist_jax.errors import SeqMnistError, UsageError
from seqmnist_jax.programs import Programs
from seqmnist_jax.run import Run
from seqmnist_jax.scores import score
from seqmnist_jax.task import SPLITS
from seqmnist_jax.writers import JsonLinesWriter, MetricWriter, MultiWriter, TensorBoardWriter

Say = Callable[[str], None]
Json = dict[str, Any]


def print_at_once(line: str) -> None:
    """Prints a line, also into a pipe, when it is said."""
    print(line, flush=True)


class Diverged(SeqMnistError):
    """The loss or a gradient is NaN or infinite."""


class Stopped(SeqMnistError):
    """The run was asked to stop and has saved where it stands."""


def open_workdir(run: Run, workdir: Path) -> None:
    """Makes the folder of a new run, or checks that the folder holds this very run.

    Raises:
      WorkdirError: it holds another run; the message names the fields that differ.
    """
    if (workdir / files.CONFIG).exists():
        old = configs.from_json(files.read_config(workdir))
        _check_identity(run, old, files.read_facts(workdir)["content_hash"], str(workdir))
    elif (workdir / files.CHECKPOINTS).exists():
        raise files.WorkdirError(
            f"{workdir} has checkpoints but no {files.CONFIG}, so it can't be told whose they are. "
            "Put the file back, or choose another --workdir."
        )
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        record(run, workdir)


def record(run: Run, workdir: Path) -> None:
    """Writes what the run is."""
    files.write_json(workdir / files.DATA, run.task.facts())
    files.write_json(workdir / files.CONFIG, run.config)


def _check_identity(run: Run, config: ml_collections.ConfigDict, content_hash: str, where: str) -> None:
    differing = configs.differences(configs.identity(config, content_hash), run.identity)
    if differing:
        raise files.WorkdirError(
            f"{where} holds another run; it differs in\n  " + "\n  ".join(differing) + "\n"
            "Give the old values to resume it, or another --workdir for a new run."
        )


@dataclasses.dataclass(frozen=True)
class Sitting:
    """What a run works with from its start, or its resumption, to its end."""

    run: Run
    workdir: Path
    clock: Clock
    checkpoints: Checkpoints
    say: Say
    tick: Callable[[int], None]
    should_stop: Callable[[], bool]
    command: str | None

    def save(self, state: steps.TrainState, validated: dict[str, float] | None) -> None:
        """Makes a checkpoint; what was measured of it where it was evaluated."""
        facts = {"config": self.run.config, "data": self.run.task.facts(), "clock": dataclasses.asdict(self.clock)}
        self.clock.measure("checkpoint", lambda: self.checkpoints.save(state, facts, validated))


def train(
    run: Run,
    workdir: Path,
    *,
    say: Say = print_at_once,
    tick: Callable[[int], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
    command: str | None = None,
) -> Json:
    """Trains a run to its end, from the start or from its last checkpoint.

    Args:
      run: as `build_run` makes it.
      workdir: the run's folder; made, or resumed if it holds this run.
      say: takes each line meant for the user.
      tick: told the step after each dispatch.
      should_stop: asked between dispatches; when true the run saves its state and stops.
      command: how a user would start this run, for the record.

    Returns:
      The summary, as written to summary.json.

    Raises:
      WorkdirError: the folder holds another run.
      CheckpointError: a checkpoint can't be read.
      Diverged: the loss, a gradient or a parameter is not finite.
      Stopped: `should_stop` said so.
    """
    open_workdir(run, workdir)
    with Checkpoints(workdir / files.CHECKPOINTS) as checkpoints:
        sitting = Sitting(run, workdir, Clock(), checkpoints, say, tick, should_stop, command)
        state, step = _begin(sitting)
        summary = _finished(sitting, step)
        if summary is not None:
            say(f"{workdir} is finished: all its {step} steps are done.")
            return summary
        record(run, workdir)  # a resumed run may have more steps, or its data in another place
        _announce(sitting, state, step)
        with closing(
            MultiWriter([JsonLinesWriter(workdir / files.METRICS), TensorBoardWriter(workdir, first_step=step + 1)])
        ) as writer:
            compiled_before = sitting.clock.compile
            if step == 0:
                text = "\n".join(f"    {name} = {value!r}" for name, value in configs.flatten(run.config).items())
                writer.write_texts(0, {"config": text})
            programs = Programs(run, state, sitting.clock)
            say(f"Compiled the training step in {sitting.clock.compile - compiled_before:.1f} s.")
            state = _train_loop(sitting, programs, writer, state, step)
            return _test(sitting, programs, writer, state)


def _begin(sitting: Sitting) -> tuple[steps.TrainState, int]:
    """The state to start from and its step: the last checkpoint's, with its clock, or a new one."""
    run, checkpoints = sitting.run, sitting.checkpoints
    step = checkpoints.last_step()
    if step is None:
        return jax.jit(run.learner.init)(), 0
    if step > run.steps:
        raise UsageError(f"{sitting.workdir} has done {step} steps already, but train.steps is {run.steps}.")
    metadata = checkpoints.metadata(step)
    _check_identity(
        run,
        configs.from_json(metadata["config"]),
        metadata["data"]["content_hash"],
        f"{sitting.workdir}, checkpoint {step},",
    )
    for name, seconds in metadata["clock"].items():
        setattr(sitting.clock, name, seconds)
    return checkpoints.restore(step, run.learner.template()), step


def _finished(sitting: Sitting, step: int) -> Json | None:
    """The summary, if this very run is finished; else what an earlier, shorter one left as its result is removed."""
    path = sitting.workdir / files.SUMMARY
    if path.exists() and step == sitting.run.steps:
        summary = files.read_json(path)
        if summary.get("steps") == step:
            return summary
    for name in (files.SUMMARY, files.PREDICTIONS):
        (sitting.workdir / name).unlink(missing_ok=True)
    # What was recorded after the checkpoint will be recorded again.
    files.keep_events(sitting.workdir, lambda event: event["step"] <= step and event["split"] != "test")
    return None


def _announce(sitting: Sitting, state: steps.TrainState, step: int) -> None:
    """The first lines: the parameters, the data, where it all goes."""
    run, task, say = sitting.run, sitting.run.task, sitting.say
    if task.dataset.warning:
        say(f"\n{'!' * 78}\nWARNING: {task.dataset.warning}\n{'!' * 78}\n")
    say(clu.parameter_overview.get_parameter_overview(state.params, include_stats=False))
    sizes = ", ".join(f"{len(task.part(split)):,} {split}" for split in SPLITS)
    say(f"Data: {task.dataset.name} ({task.dataset.source}): {sizes}; permutation {task.protocol.permutation}.")
    start = f"Resuming at step {step}" if step else "Training"
    say(f"{start}: {run.steps} steps of {run.batch_size}, in {sitting.workdir}")


def _train_loop(
    sitting: Sitting, programs: Programs, writer: MetricWriter, state: steps.TrainState, step: int
) -> steps.TrainState:
    """Dispatch steps up to the next point where the host has something to do; do it; repeat."""
    run, clock, checkpoints = sitting.run, sitting.clock, sitting.checkpoints
    progress = Progress(step, run.steps, clock)
    while step < run.steps:
        # 1. Steps, as many as may pass without the host, in a dispatch of bounded time.
        ends = [step + progress.steps_within(run.dispatch_seconds), run.steps]
        ends += [step + every - step % every for every in (run.eval_every, run.checkpoint_every)]
        before = clock.train
        state, step, finite = programs.train(state, step, min(ends) - step)
        if not finite:
            raise _diverged(step + 1, programs.divergence(state, step), checkpoints.last_step())
        progress.advance(step, clock.train - before)
        sitting.tick(step)

        # 2. Metrics.
        validated = None
        is_end = step == run.steps
        if step % run.eval_every == 0 or is_end:
            times = {"steps_per_second": progress.close_window(), "seconds": clock.train}
            scores = {f"train/{name}": value for name, value in (steps.as_numbers(state.metrics) | times).items()}
            split = run.task.measured_split
            if run.task.part(split):
                validated, _ = programs.evaluate(state.variables, split)
                scores |= {f"{split}/{name}": value for name, value in (validated | times).items()}
                if not math.isfinite(validated["loss"]):
                    raise _diverged(step, f"the loss on {split} is {validated['loss']}", checkpoints.last_step())
            writer.write_scalars(step, scores)
            writer.write_histograms(step, _norm_histograms(state, since=run.eval_every))
            if step % run.eval_every == 0:  # not at an end between evaluations, which more steps may pass over
                state = state.replace(metrics=steps.TrainMetrics.empty())
            sitting.say(progress.line(scores))
        elif progress.is_due():
            sitting.say(progress.line({f"train/{name}": v for name, v in steps.as_numbers(state.metrics).items()}))

        # 3. A checkpoint: wherever a model was measured that may turn out the best, and when it is time.
        stopping = sitting.should_stop() and not is_end
        if validated or step % run.checkpoint_every == 0 or is_end or stopping:
            writer.flush()  # what a checkpoint follows must be on record before it
            sitting.save(state, validated)
        if stopping:
            raise Stopped(f"Stopped at step {step} of {run.steps}; saved. The same command resumes {sitting.workdir}.")
    return state


def _norm_histograms(state: steps.TrainState, since: int) -> dict[str, np.ndarray]:
    """The gradient norms of each tensor, before and after the clip, at the steps since the last report."""
    norms = np.asarray(state.gradient_norms)[: (int(state.step) - 1) % since + 1]
    return {
        f"gradient_norm_{kind}/{name}": norms[:, place, tensor]
        for place, kind in enumerate(("raw", "clipped"))
        for tensor, name in enumerate(steps.tensor_names(state.params))
    }


def _diverged(step: int, reason: str, last_step: int | None) -> Diverged:
    last = (
        "There is no checkpoint before it" if last_step is None else f"The last good checkpoint is of step {last_step}"
    )
    return Diverged(
        f"Training diverged at step {step}: {reason}. {last}. "
        "Try a lower optimizer.learning_rate or optimizer.clip.norm, in a new work directory."
    )


def _test(sitting: Sitting, programs: Programs, writer: MetricWriter, state: steps.TrainState) -> Json:
    """The result: the one use of the test set, by the selected checkpoint (and, beside it, the last)."""
    run, clock, checkpoints, workdir = sitting.run, sitting.clock, sitting.checkpoints, sitting.workdir
    best_step = None if run.task.protocol.selection == "last" else checkpoints.best_step()
    selected_on = "last" if best_step is None else run.task.measured_split
    best_step = run.steps if best_step is None else best_step
    labels = run.task.part("test").labels
    _, logits = programs.evaluate(state.variables, "test")
    last = scores = score(logits, labels)
    if best_step != run.steps:
        best = checkpoints.restore_variables(best_step, run.learner.template())
        _, logits = programs.evaluate(best, "test")
        scores = score(logits, labels)
    told = {name: scores[name] for name in ("loss", "accuracy", "calibration_error")}
    times = {"steps_per_second": run.steps / clock.train, "seconds": clock.train}
    writer.write_scalars(run.steps, {f"test/{name}": value for name, value in (told | times).items()})
    writer.flush()
    predictions = logits.argmax(-1).astype(np.uint8)
    files.write_arrays(workdir / files.PREDICTIONS, labels=labels, predictions=predictions, logits=logits)
    dataset = run.task.facts()
    del dataset["permutation_indices"]
    validated = checkpoints.validation(best_step) if run.task.measured_split == "validation" else None
    summary = {
        "test_accuracy": scores["accuracy"],
        "test_accuracy_interval": scores["accuracy_interval"],
        "test_loss": scores["loss"],
        "test_calibration_error": scores["calibration_error"],
        "last_test_accuracy": last["accuracy"],
        "validation_accuracy": None if validated is None else validated["accuracy"],
        "selected_on": selected_on,
        "best_step": best_step,
        "steps": run.steps,
        "train_seconds": clock.train,
        "compile_seconds": clock.compile,
        "evaluate_seconds": clock.evaluate,
        "checkpoint_seconds": clock.checkpoint,
        "steps_per_second": run.steps / clock.train,
        "parameters": int(clu.parameter_overview.count_parameters(state.params)),
        "dataset": dataset,
        "seed": run.learner.seed,
        "identity": run.identity,
        "command": sitting.command,
        "versions": provenance.versions(),
        "device": provenance.device(),
        "git_commit": provenance.git_commit(),
    }
    files.write_json(workdir / files.SUMMARY, summary)
    return summary
