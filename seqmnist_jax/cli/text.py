"""What people read: the results of the modes, which are JSON values, as text."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clu.parameter_overview
import numpy as np

from seqmnist_jax.analysis import results_page
from seqmnist_jax.analysis.export import DESCRIPTION, PARAMETERS, PROGRAM
from seqmnist_jax.data.protocols import SELECTIONS, TEST_SELECTION
from seqmnist_jax.data.task import SPLITS
from seqmnist_jax.training.run import Run
from seqmnist_jax.training.scores import in_percent
from seqmnist_jax.workdir import caveats
from seqmnist_jax.workdir import config as configs

Json = dict[str, Any]

# Where in a sequence the text shows how much is known.
ANYTIME_SHARES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def result(summary: Json) -> str:
    """A run's summary."""
    dataset, validation = summary["dataset"], summary["validation_accuracy"]
    low, high = summary["test_accuracy_interval"]
    validated = "none (no validation set, or not evaluated)" if validation is None else f"{validation:.2%}"
    lines = [
        f"test accuracy        {summary['test_accuracy']:.2%} ({low:.2%} to {high:.2%})"
        f" of {dataset['sizes']['test']:,} images ({dataset['name']}), loss {summary['test_loss']:.4f}",
        f"checkpoint           step {summary['best_step']}, selected on {summary['selected_on']}"
        f" (the last one has {summary['last_test_accuracy']:.2%})",
        f"validation accuracy  {validated}",
        f"training             {summary['steps']} steps in {summary['train_seconds']:.1f} s,"
        f" {summary['steps_per_second']:.1f} steps/s, compiled in {summary['compile_seconds']:.1f} s",
        f"device               {summary['device']}",
    ]
    return "\n".join(lines + _warnings(dict(summary, warnings=caveats.warnings(dataset, summary))))


def _warnings(result: Json) -> list[str]:
    """What must be said with a result, below an empty line."""
    return ["", *(f"WARNING: {warning}" for warning in result["warnings"])] if result["warnings"] else []


def sweep(summary: Json) -> str:
    """A sweep's summary: the ranking by validation accuracy."""

    def told(scores: Json | None) -> str:
        return "-" if scores is None else in_percent(scores["mean"], scores["std"], scores["interval"])

    lines = [("", "runs", "validation, %", "test, % (95 % t intervals over seeds)")]
    for entry in summary["ranking"]:
        changes = ", ".join(f"{field}={value}" for field, value in entry["changes"].items()) or "all seeds"
        runs, lost = len(entry["replicas"]), len(entry["diverged"])
        count = f"{runs} of {runs + lost}" if lost else str(runs)
        lines.append((changes, count, told(entry["validation"]), told(entry["test"])))
    text = [f"Data: {', '.join(summary['datasets'])}", *aligned(lines)] if summary["ranking"] else []
    text += [f"DIVERGED {one['name']}: {one['reason']}" for one in summary["diverged"]]
    return "\n".join(text + _warnings(summary))


def table(rows: Sequence[Json], without_result: Sequence[Path]) -> str:
    """The rows of `table.rows` in columns, by task; below them what `results_page.warnings` says."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        cells = [("row", "config", "seeds", "validation, %", "test, %")]
        below: list[list[str]] = [[]]
        for row in of_task:
            name, *changes = (row["config"] or row["model"]).split(", ")
            scores = [in_percent(row[f"{split}_accuracy"], row[f"{split}_std"]) for split in ("validation", "test")]
            lost = f" ({len(row['diverged_seeds'])} diverged)" if row["diverged_seeds"] else ""
            cells.append((row["id"], name, f"{len(row['seeds'])}{lost}", *scores))
            below.append(textwrap.wrap(f"with {', '.join(changes)}", 66) if changes else [])
        lines += [f"{task}:"]
        for line, more in zip(aligned(cells), below, strict=True):
            lines += [f"  {line}", *(f"{'':11}{words}" for words in more)]
        lines += [""]
    lines += [f"WARNING: {sentence}" for sentence in results_page.warnings(rows, without_result)]
    lines += [
        "Mean ± standard deviation over the seeds. A pipe gets all of it, in Markdown: intervals, times, commands,"
    ]
    lines[-1] += " commits, devices; so do --csv=FILE and --json."
    return "\n".join(lines)


def evaluation(result: Json) -> str:
    """The result of `evaluate`."""
    low, high = result["accuracy_interval"]
    lines = [
        f"{result['split']} accuracy {result['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}), loss "
        f"{result['loss']:.4f}, calibration error {result['calibration_error']:.4f}, on {result['examples']:,} "
        f"images of {result['dataset']} ({result['source']}), by checkpoint {result['checkpoint_step']}"
    ]
    if result["anytime"] is not None:
        accuracy, entropy = result["anytime"]["accuracy"], result["anytime"]["entropy"]
        at = sorted({max(1, round(len(accuracy) * share)) for share in ANYTIME_SHARES})
        lines += ["", "steps read  " + " ".join(f"{step:>7}" for step in at)]
        lines += ["accuracy    " + " ".join(f"{accuracy[step - 1]:>7.2%}" for step in at)]
        lines += ["entropy     " + " ".join(f"{entropy[step - 1]:>7.3f}" for step in at) + "  nats"]
    counts = result["confusion"]
    width = max(len(str(count)) for row in counts for count in row) + 1
    heading = "".join(f"{name:>{width}}" for name in range(len(counts)))
    lines += ["", f"true \\ predicted{heading}   accuracy"]
    for name, (row, one) in enumerate(zip(counts, result["per_class"], strict=True)):
        share = "-" if one["accuracy"] is None else f"{one['accuracy']:.2%}"
        lines.append(f"{name:>16}{''.join(f'{count:>{width}}' for count in row)}   {share:>8}")
    return "\n".join(lines + _warnings(result))


def description(run: Run, description: Json) -> str:
    """The result of `describe`, without the numbers of the permutation."""
    data, shapes = description["data"], description["shapes"]
    flat = configs.flatten(description["config"])
    width = max(map(len, flat))
    lines = ["Config (* overridden):"]
    lines += [f"{'*' if name in description['overridden'] else ' '} {name:<{width}}  {flat[name]!r}" for name in flat]
    lines += ["", "Parameters:"]
    lines += [clu.parameter_overview.get_parameter_overview(run.learner.template().params, include_stats=False)]
    sizes = ", ".join(f"{data['sizes'][split]:,} {split}" for split in SPLITS)
    lines += [
        "",
        f"Input        {shapes['input']} [batch, time, features] -> logits {shapes['logits']}",
        f"Steps        {description['steps']:,} of {description['batch_size']} examples: "
        f"{description['steps_per_epoch']:,.2f} an epoch, {description['epochs']:.2f} epochs",
        f"Data         {data['name']} from source {data['source']!r}: {sizes}; content {data['content_hash'][:16]}",
        f"Protocol     {_protocol(run)}",
        f"Split        {data['split']}",
        f"Scaling      {data['scaling']}",
        f"Permutation  {data['permutation']}: {', '.join(map(str, description['permutation'][:8]))}, ...",
        f"Selection    {data['selection']}: {SELECTIONS.get(data['selection'], TEST_SELECTION)}",
        f"Device       {', '.join(description['device'])}",
        f"Recurrence   {description['recurrence']}",
    ]
    if names := description["runs"]:
        lines += [f"Sweep        {len(names)} runs: {'; '.join(names)}. The first is described here."]
    if description["workdir"]:
        lines += [f"Workdir      {description['workdir']}"]
    if data["warning"]:
        lines += ["", f"WARNING: {data['warning']}"]
    return "\n".join(lines)


def _protocol(run: Run) -> str:
    """The protocol in force: where it comes from, what of it is replaced, what must be said of the rest."""
    protocol = run.task.protocol
    words = [f"{protocol.name}: {protocol.source}"]
    if protocol.overrides:
        words += [f"overridden: {', '.join(protocol.overrides)}"]
    if protocol.flaws:
        words += [f"caveats: {'; '.join(protocol.flaws.values())}"]
    return "; ".join(words)


def difference(found: Json) -> str:
    """Where two runs differ first, as `rerun.Difference` has it."""
    return f"step {found['step']}: {found['what']} is {found['first']!r} against {found['second']!r}"


def comparison(result: Json) -> str:
    """The result of `compare`: a line for each run, the counts, the verdict, the warnings."""
    rows = [("", "accuracy", "95 % interval", "loss", "calibration error", "checkpoint", "run")]
    for name in ("first", "second"):
        run = result[name]
        low, high = run["accuracy_interval"]
        checkpoint = f"{run['best_step']}, by {run['selected_on']}"
        accuracy = f"{run['accuracy']:.2%}"
        interval = f"{low:.2%} to {high:.2%}"
        calibration = f"{run['calibration_error']:.2%}"
        rows.append((name, accuracy, interval, f"{run['loss']:.4f}", calibration, checkpoint, run["workdir"]))
    lines = [f"{result['examples']:,} test images of {result['dataset']}, content {result['content_hash'][:12]}", ""]
    lines += aligned(rows)
    test = result["mcnemar"]
    lines += [
        "",
        f"right by both {test['both']:,}, by the first only {test['only_a']:,}, by the second only "
        f"{test['only_b']:,}, by neither {test['neither']:,}",
        result["verdict"],
    ]
    if result["rerun"] is not None:
        found = result["rerun"]["first_difference"]
        where = "nothing they recorded differs, times aside"
        if found is not None:
            where = f"they differ first at {difference(found)}"
        lines += ["", f"These are the same run made twice (config, data, seed): {where}."]
    return "\n".join(lines + _warnings(result))


def export(result: Json) -> str:
    """The result of `export`."""
    folder, written = result["folder"], result["files"]
    numbers = sum(int(np.prod(shape)) for shape in result["tensors"].values())
    goes_in, comes_out = (
        f"{one['dtype']} [{', '.join(map(str, one['shape']))}]" for one in (result["input"], result["output"])
    )
    told = {
        PROGRAM: f"images {goes_in} -> logits {comes_out}, on {', '.join(result['platforms'])}",
        PARAMETERS: f"{len(result['tensors'])} tensors of {numbers:,} numbers in all",
    }
    lines = [f"Checkpoint {result['checkpoint_step']} is exported to {folder}:", ""]
    lines += [f"  {name:<18}  {written[name]['bytes']:>11,} bytes  {what}" for name, what in told.items()]
    lines += [f"  {DESCRIPTION:<18}  {'':>11}        what they hold, how to use them, where they come from"]
    lines += ["", f"In {folder}, with JAX and flatbuffers and nothing of this package:", ""]
    lines += [f"  {line}" for line in result["load"]]
    return "\n".join(lines + _warnings(result))
