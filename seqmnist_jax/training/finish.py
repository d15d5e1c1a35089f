"""From trained replicas to their results: the one use of the test set, for which trials have none."""

import datetime

import clu.parameter_overview
import jax
import numpy as np

from seqmnist_jax.devices import processes
from seqmnist_jax.devices.trees import stack, unstack
from seqmnist_jax.training import records
from seqmnist_jax.training.programs import Programs
from seqmnist_jax.training.replicas import Json, Replica, ReplicaGroup
from seqmnist_jax.training.scores import score
from seqmnist_jax.training.state import TrainState, restore_variables
from seqmnist_jax.workdir import caveats, files


def write_results(group: ReplicaGroup, programs: Programs, states: TrainState) -> dict[int, Json]:
    """The results of each run's selected checkpoint (and, beside it, of the last), written and given.

    Args:
      group: the runs.
      programs: theirs.
      states: the last, as the programs take them.

    Returns:
      The summary of each by its place, as in its summary.json; none of one that diverged.

    Raises:
      Diverged: no run has finite results.
    """
    run = group.run
    selects = run.task.protocol.selection != "last"
    processes.wait("all checkpoints are made")
    for replica in group.replicas:
        replica.checkpoints.refresh()
    ended = [replica for replica in group.replicas if replica.diverged is None]
    best_steps = [(one.checkpoints.best_step(one.run.is_measured) if selects else None) or run.steps for one in ended]
    if not run.tests:
        return {
            replica.place: _write_summary(group, replica, step, {})
            for replica, step in zip(ended, best_steps, strict=True)
        }
    variables = [state.variables for state in unstack(states, len(group.runs))]
    for replica, step in zip(ended, best_steps, strict=True):
        if step != run.steps:
            template = replica.run.learner.template
            variables[replica.place] = restore_variables(replica.checkpoints, step, template)
    last = best = [logits for _, logits in programs.evaluate(states.variables, "test")]
    if any(step != run.steps for step in best_steps):
        best = [logits for _, logits in programs.evaluate(programs.place(stack(variables)), "test")]
    for logits in (best, last):
        group.mark_infinite(run.steps, "test", logits)
    return {
        replica.place: _write_result(group, replica, step, best[replica.place], last[replica.place])
        for replica, step in zip(ended, best_steps, strict=True)
        if replica.diverged is None
    }


def _write_result(
    group: ReplicaGroup, replica: Replica, best_step: int, logits: np.ndarray, last_logits: np.ndarray
) -> Json:
    """Writes the result of a run: its metrics, predictions and summary, and gives the summary."""
    run, clock = replica.run, group.clock_of_one()
    replica.check_place()
    labels = run.task.part("test").labels
    scores = score(logits, labels)
    last = scores if logits is last_logits else score(last_logits, labels)
    numbers = {name: scores[name] for name in ("loss", "accuracy", "calibration_error")}
    numbers |= {"steps_per_second": run.steps / clock.train, "seconds": clock.train}
    replica.write_scalars(run.steps, {f"test/{name}": value for name, value in numbers.items()})
    records.write_pictures(replica.tensorboard, run, run.steps, "test", logits)
    replica.tensorboard.write_end(run.steps)
    replica.flush()
    if processes.is_main():
        answers = {"labels": labels, "predictions": logits.argmax(-1).astype(np.uint8), "logits": logits}
        files.write_arrays(replica.workdir / files.PREDICTIONS, **answers)
    tested = {
        "test_accuracy": scores["accuracy"],
        "test_accuracy_interval": scores["accuracy_interval"],
        "test_loss": scores["loss"],
        "test_calibration_error": scores["calibration_error"],
        "last_test_accuracy": last["accuracy"],
    }
    return _write_summary(group, replica, best_step, tested)


def _write_summary(group: ReplicaGroup, replica: Replica, best_step: int, tested: Json) -> Json:
    """Writes a run's summary, and gives it; `tested` is what the test images say of it."""
    run, clock = replica.run, group.clock_of_one()
    dataset = {name: value for name, value in replica.facts["data"].items() if name != "permutation_indices"}
    measured = replica.checkpoints.validation(best_step)
    selects = run.task.protocol.selection != "last" and measured is not None
    validated = measured if run.task.measured_split == "validation" else None
    summary = tested | {
        "validation_accuracy": None if validated is None else validated["accuracy"],
        "selected_on": run.task.measured_split if selects else "last",
        "best_step": best_step,
        "lost_checkpoints": replica.lost_checkpoints(best_step, run.steps),
        "steps": run.steps,
        # The times are its share of what so many runs took together.
        "replicas": len(group.runs),
        "processes": jax.process_count(),
        "train_seconds": clock.train,
        "compile_seconds": clock.compile,
        "evaluate_seconds": clock.evaluate,
        "checkpoint_seconds": clock.checkpoint,
        "steps_per_second": run.steps / clock.train,
        "parameters": int(clu.parameter_overview.count_parameters(run.learner.template.params)),
        "dataset": dataset,
        "seed": run.learner.seed,
        "precision": run.learner.model.precision,
        "eval_precision": run.learner.eval_precision,
        "identity": run.identity,
        **({"choice": run.choice} if run.choice else {}),
        **{name: replica.sittings[-1][name] for name in ("command", "versions", "git_commit")},
        # Of all sittings, because their times are added.
        "device": "; then ".join(dict.fromkeys(sitting["device"] for sitting in replica.sittings)),
        "sittings": replica.sittings,
        # When it ended, for who cites it: a commit has no day of its own.
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    summary["warnings"] = caveats.warnings(dataset, summary)
    replica.write_json(files.SUMMARY, summary)
    return summary
