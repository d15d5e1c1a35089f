"""Training: from a run to a work directory with a result. Read it top to bottom."""

import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax import config as configs
from seqmnist_jax import provenance, steps
from seqmnist_jax import workdir as files
from seqmnist_jax.checkpoints import Checkpoints
from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.data.sources import Images
from seqmnist_jax.errors import SeqMnistError, UsageError
from seqmnist_jax.run import Run
from seqmnist_jax.task import SPLITS
from seqmnist_jax.writers import JsonLinesWriter, MetricWriter, MultiWriter, TensorBoardWriter

Say = Callable[[str], None]
Json = dict[str, Any]

# A progress line at least this often (seconds), where evaluations are farther apart.
PROGRESS_SECONDS = 10.0
# The first dispatch measures the speed by which later ones are sized.
FIRST_DISPATCH_STEPS = 10


class Diverged(SeqMnistError):
    """The loss or a gradient is NaN or infinite."""


class Stopped(SeqMnistError):
    """The run was asked to stop and has saved where it stands."""

    exit_code = 130


@dataclasses.dataclass
class Clock:
    """Seconds spent on each thing, over all sittings of a run. Nothing is timed without waiting for the device."""

    train: float = 0.0
    evaluate: float = 0.0
    checkpoint: float = 0.0
    compile: float = 0.0

    def measure(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, ready on the device; its seconds are added to `what`."""
        start = time.perf_counter()
        result = jax.block_until_ready(work())
        setattr(self, what, getattr(self, what) + time.perf_counter() - start)
        return result


def open_workdir(run: Run, workdir: Path) -> None:
    """Makes the folder of a new run, or checks that the folder holds this very run.

    Raises:
      WorkdirError: it holds another run; the message names the fields that differ.
    """
    if not (workdir / files.CONFIG).exists():
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / files.DATA, run.task.facts())
        files.write_json(workdir / files.CONFIG, run.config)
        return
    old = configs.from_json(files.read_config(workdir))
    old_identity = configs.identity(old, files.read_facts(workdir)["content_hash"])
    differing = configs.differences(old_identity, run.identity)
    if differing:
        raise files.WorkdirError(
            f"{workdir} holds another run; it differs in\n  " + "\n  ".join(differing) + "\n"
            "Give the old values to resume it, or another --workdir for a new run."
        )


class Progress:
    """How far a run is and how fast it goes: sizes the dispatches and words the progress lines."""

    def __init__(self, step: int, total: int, clock: Clock):
        self._total = total
        self._clock = clock
        self._start = self._last_line = time.perf_counter()
        self._first_step = self._step = self._window_step = step
        self._window_seconds = clock.train
        self._rate: float | None = None

    def steps_within(self, seconds: float) -> int:
        """About how many steps fit into this time; at least one."""
        return FIRST_DISPATCH_STEPS if self._rate is None else max(1, math.floor(self._rate * seconds))

    def advance(self, step: int, train_seconds: float) -> None:
        """Notes that a dispatch brought the run to `step` in this time."""
        self._rate = (step - self._step) / max(train_seconds, 1e-9)
        self._step = step

    def close_window(self) -> float:
        """Steps a second of training time since the last call."""
        steps_done, seconds = self._step - self._window_step, self._clock.train - self._window_seconds
        self._window_step, self._window_seconds = self._step, self._clock.train
        return steps_done / max(seconds, 1e-9)

    def is_due(self) -> bool:
        """Whether the user has waited long for a line."""
        return time.perf_counter() - self._last_line > PROGRESS_SECONDS

    def line(self, scores: dict[str, float]) -> str:
        """One line: step, training and validation scores, speed, time left."""
        self._last_line = now = time.perf_counter()
        left = (now - self._start) / (self._step - self._first_step) * (self._total - self._step)
        parts = [f"step {self._step:>{len(str(self._total))}}/{self._total}"]
        for split in ("train", "validation"):
            if f"{split}/loss" in scores:
                parts.append(f"{split} loss {scores[f'{split}/loss']:.4f} accuracy {scores[f'{split}/accuracy']:.2%}")
        parts.append(f"{self._rate or 0.0:.1f} steps/s")
        parts.append(f"{datetime.timedelta(seconds=round(left))} left")
        return "  ".join(parts)


class Programs:
    """The compiled programs of a run, with the training set on the device."""

    def __init__(self, run: Run, clock: Clock):
        self._run = run
        self._clock = clock
        self._images = jnp.asarray(run.task.train.images)
        self._labels = jnp.asarray(run.task.train.labels)
        self._predict: dict[int, Callable[..., jax.Array]] = {}
        learner = run.learner
        self._stream = ExampleStream(steps.data_key(learner.seed), len(run.task.train), run.batch_size)
        orders, _, _ = self._stream.window(0)
        self._train = clock.measure(
            "compile",
            lambda: (
                jax.jit(learner.train_steps(run.batch_size), donate_argnums=0)
                .lower(
                    learner.template(), learner.hyper, self._images, self._labels, orders, jnp.int32(0), jnp.int32(0)
                )
                .compile()
            ),
        )

    def train(self, state: steps.TrainState, step: int, count: int) -> tuple[steps.TrainState, int, bool]:
        """Up to `count` steps from `step`.

        Returns:
          The new state (the old one's buffers are gone), its step, and whether all was finite.
        """
        orders, offset, most = self._stream.window(step)
        count = min(count, most)
        bounds = jax.device_put((np.int32(offset), np.int32(count)))
        arguments = (self._run.learner.hyper, self._images, self._labels, orders, *bounds)
        state, finite = self._clock.measure("train", lambda: self._train(state, *arguments))
        step, finite = jax.device_get((state.step, finite))
        return state, int(step), bool(finite)

    def evaluate(self, state: steps.TrainState, part: Images) -> tuple[dict[str, float], np.ndarray]:
        """Loss and accuracy of a state on some images, and its logits [count, classes]."""
        if len(part) not in self._predict:
            predict = jax.jit(self._run.learner.predict_logits(self._run.eval_batch_size))
            shape = jax.ShapeDtypeStruct(part.images.shape, jnp.uint8)
            self._predict[len(part)] = self._clock.measure(
                "compile", lambda: predict.lower(state.variables, shape).compile()
            )

        def score() -> tuple[dict[str, float], np.ndarray]:
            logits = self._predict[len(part)](state.variables, jnp.asarray(part.images))
            return steps.as_numbers(steps.eval_metrics(logits, jnp.asarray(part.labels))), np.asarray(logits)

        return self._clock.measure("evaluate", score)

    def divergence(self, state: steps.TrainState, step: int) -> str:
        """What went wrong at the step after `step`: its loss and its largest gradient, by tensor."""
        orders, offset, _ = self._stream.window(step)
        batch = orders[offset : offset + self._run.batch_size]
        learner = self._run.learner
        loss, gradients = steps.gradient_report(
            learner.model, learner.view, state, self._images[batch], self._labels[batch]
        )
        largest = {name: math.inf if math.isnan(value) else float(value) for name, value in gradients.items()}
        name = max(largest, key=lambda n: largest[n])
        return f"the loss is {float(loss):.4g} and the largest gradient {float(gradients[name]):.4g}, of {name}"


def train(run: Run, workdir: Path, *, say: Say = print, should_stop: Callable[[], bool] = lambda: False) -> Json:
    """Trains a run to its end, from the start or from its last checkpoint.

    Args:
      run: as `build_run` makes it.
      workdir: the run's folder; made, or resumed if it holds this run.
      say: takes each line meant for the user.
      should_stop: asked between dispatches; when true the run saves its state and stops.

    Returns:
      The summary, as written to summary.json.

    Raises:
      WorkdirError: the folder holds another run.
      CheckpointError: a checkpoint can't be read.
      Diverged: loss or gradient is not finite.
      Stopped: `should_stop` said so.
    """
    open_workdir(run, workdir)
    clock = Clock()
    with Checkpoints(workdir / files.CHECKPOINTS) as checkpoints:
        state, step = _begin(run, workdir, checkpoints, clock)
        if step == run.steps and (workdir / files.SUMMARY).exists():
            say(f"{workdir} is finished: all its {step} steps are done.")
            return files.read_json(workdir / files.SUMMARY)
        _announce(run, workdir, state, step, say)
        files.truncate_metrics(workdir, step)
        with closing(
            MultiWriter([JsonLinesWriter(workdir / files.METRICS), TensorBoardWriter(workdir, first_step=step + 1)])
        ) as writer:
            programs = Programs(run, clock)
            say(f"Compiled the training step in {clock.compile:.1f} s.")
            state = _train_loop(run, programs, state, step, clock, checkpoints, writer, say, should_stop)
            summary = _test(run, programs, state, clock, checkpoints, writer, workdir)
    return summary


def _begin(run: Run, workdir: Path, checkpoints: Checkpoints, clock: Clock) -> tuple[steps.TrainState, int]:
    """The state a run starts from and its step: the last checkpoint's, with its clock, or a new one."""
    last = checkpoints.last_step()
    if last is None:
        return jax.jit(run.learner.init)(), 0
    if last > run.steps:
        raise UsageError(f"{workdir} has done {last} steps already, but train.steps is {run.steps}.")
    restored = checkpoints.restore(last, run.learner.template())
    for name, seconds in restored.metadata["clock"].items():
        setattr(clock, name, seconds)
    return restored.state, last


def _announce(run: Run, workdir: Path, state: steps.TrainState, step: int, say: Say) -> None:
    """The first lines: the parameters, the data, where it all goes."""
    task = run.task
    if task.dataset.warning:
        say(f"\n{'!' * 78}\nWARNING: {task.dataset.warning}\n{'!' * 78}\n")
    say(clu.parameter_overview.get_parameter_overview(state.params, include_stats=False))
    sizes = ", ".join(f"{len(task.part(split)):,} {split}" for split in SPLITS)
    say(f"Data: {task.dataset.name} ({task.dataset.source}): {sizes}; permutation {task.protocol.permutation}.")
    start = f"Resuming at step {step}" if step else "Training"
    say(f"{start}: {run.steps} steps of {run.batch_size}, in {workdir}")


def _train_loop(
    run: Run,
    programs: Programs,
    state: steps.TrainState,
    step: int,
    clock: Clock,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    say: Say,
    should_stop: Callable[[], bool],
) -> steps.TrainState:
    """Dispatch steps up to the next point where the host has something to do; do it; repeat."""
    progress = Progress(step, run.steps, clock)

    def save(validated: dict[str, float] | None) -> None:
        writer.flush()  # what a checkpoint follows must be on record before it
        metadata = {"clock": dataclasses.asdict(clock), "config": run.config, "data": run.task.facts()}
        clock.measure("checkpoint", lambda: checkpoints.save(state, metadata, validated))

    while step < run.steps:
        # 1. Steps, as many as may pass without the host, in a dispatch of bounded time.
        ends = [step + progress.steps_within(run.dispatch_seconds), run.steps]
        ends += [step + every - step % every for every in (run.eval_every, run.checkpoint_every)]
        before = clock.train
        state, step, finite = programs.train(state, step, min(ends) - step)
        if not finite:
            raise Diverged(
                f"Training diverged at step {step + 1}: {programs.divergence(state, step)}. "
                f"The last good checkpoint is {_name(checkpoints.last_step())}. "
                "Try a lower optimizer.learning_rate or optimizer.clip.norm, in a new work directory."
            )
        progress.advance(step, clock.train - before)

        # 2. Metrics.
        validated = None
        is_end = step == run.steps
        if step % run.eval_every == 0 or is_end:
            scores = {f"train/{name}": value for name, value in steps.as_numbers(state.metrics).items()}
            scores |= {"train/steps_per_second": progress.close_window(), "train/seconds": clock.train}
            if len(run.task.validation):
                validated, _ = programs.evaluate(state, run.task.validation)
                scores |= {f"validation/{name}": value for name, value in validated.items()}
                scores |= {"validation/seconds": clock.train}
            writer.write_scalars(step, scores)
            state = state.replace(metrics=steps.TrainMetrics.empty())
            say(progress.line(scores))
        elif progress.is_due():
            say(progress.line({f"train/{name}": value for name, value in steps.as_numbers(state.metrics).items()}))

        # 3. A checkpoint.
        if step % run.checkpoint_every == 0 or is_end:
            save(validated)
        if should_stop() and not is_end:
            if checkpoints.last_step() != step:
                save(None)
            raise Stopped(f"Stopped at step {step} of {run.steps} and saved; the same command with --workdir resumes.")
    return state


def _name(step: int | None) -> str:
    return "none: it diverged before the first" if step is None else f"that of step {step}"


def _test(
    run: Run,
    programs: Programs,
    state: steps.TrainState,
    clock: Clock,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    workdir: Path,
) -> Json:
    """The result: the one use of the test set, by the selected checkpoint (and, beside it, the last)."""
    best_step = checkpoints.best_step() if run.task.protocol.selection == "validation" else None
    selected_on = "last" if best_step is None else "validation"
    best_step = run.steps if best_step is None else best_step
    test = run.task.dataset.test
    last_scores, logits = programs.evaluate(state, test)
    scores = last_scores
    if best_step != run.steps:
        scores, logits = programs.evaluate(checkpoints.restore(best_step, run.learner.template()).state, test)
    writer.write_scalars(run.steps, {f"test/{name}": value for name, value in scores.items()})
    writer.flush()
    predictions = logits.argmax(-1).astype(np.uint8)
    files.write_arrays(workdir / files.PREDICTIONS, labels=test.labels, predictions=predictions, logits=logits)
    dataset = run.task.facts()
    del dataset["permutation_indices"]
    validated = checkpoints.validation(best_step)
    summary = {
        "test_accuracy": scores["accuracy"],
        "test_loss": scores["loss"],
        "last_test_accuracy": last_scores["accuracy"],
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
        "versions": provenance.versions(),
        "device": provenance.device(),
        "git_commit": provenance.git_commit(),
    }
    files.write_json(workdir / files.SUMMARY, summary)
    return summary
