"""What people read: the results of the modes, which are JSON values, as text."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqmnist_jax.analysis import results_page
from seqmnist_jax.analysis.export import DESCRIPTION, PARAMETERS, PROGRAM
from seqmnist_jax.data.protocols import SELECTIONS, TEST_SELECTION
from seqmnist_jax.data.task import SPLITS
from seqmnist_jax.training.plan import choice_in_words, ranked_in_words
from seqmnist_jax.training.run import Run
from seqmnist_jax.training.scores import in_percent
from seqmnist_jax.workdir import caveats, provenance
from seqmnist_jax.workdir import config as configs

Json = dict[str, Any]

# Where in a sequence the text shows how much is known.
ANYTIME_SHARES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def result(summary: Json) -> str:
    """A run's summary, a fact a line."""
    dataset, validation = summary["dataset"], summary["validation_accuracy"]
    facts = [
        *_accuracy("test", summary["test_accuracy"], summary["test_accuracy_interval"]),
        ("test images", f"{dataset['sizes']['test']:,} of {dataset['name']}"),
        ("test loss", f"{summary['test_loss']:.4f}"),
        ("checkpoint", f"step {summary['best_step']:,}, selected on {summary['selected_on']}"),
        ("last checkpoint", f"test accuracy {summary['last_test_accuracy']:.2%}"),
        (
            "validation accuracy",
            "none (no validation set, or not evaluated)" if validation is None else f"{validation:.2%}",
        ),
        (
            "training",
            f"{summary['steps']:,} steps in {summary['train_seconds']:.1f} s, "
            f"{summary['steps_per_second']:,.1f} a second",
        ),
        ("compiling", f"{summary['compile_seconds']:.1f} s"),
        ("device", summary["device"]),
    ]
    return "\n".join([*aligned(facts), *_warnings(dict(summary, warnings=caveats.warnings(dataset, summary)))])


def _accuracy(split: str, accuracy: float, interval: Sequence[float]) -> list[tuple[str, str]]:
    over = "{:.2%} to {:.2%}, 95 % Wilson interval".format(*interval)
    return [(f"{split} accuracy", f"{accuracy:.2%}"), ("over images", over)]


def _warnings(result: Json) -> list[str]:
    """What must be said with a result, below an empty line."""
    return ["", *(f"WARNING: {warning}" for warning in result["warnings"])] if result["warnings"] else []


def sweep(summary: Json) -> str:
    """A sweep's summary: the ranking by validation accuracy; of one recipe each run too."""
    lines = [("", "runs", "validation, %", "test, %")]
    for entry in summary["ranking"]:
        lines.append(ranked_in_words(entry))
        if len(summary["ranking"]) == 1:
            for name, scores in entry["scores"].items():
                validation, test = ("-" if one is None else f"{100 * one:.2f}" for one in scores.values())
                lines.append((f"  {name}", "", validation, test))
    text = [f"Data: {', '.join(summary['datasets'])}", *aligned(lines)] if summary["ranking"] else []
    if any(entry["test"]["interval"] for entry in summary["ranking"]):
        text += ["Mean ± standard deviation over the runs, in brackets the mean's 95 % t interval."]
    for entry in summary["ranking"]:
        if entry["choice"]:
            text += [f"Chosen for {entry['replicas'][0]} and its other seeds: {choice_in_words(entry['choice'])}"]
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
    lines = aligned(
        [
            *_accuracy(result["split"], result["accuracy"], result["accuracy_interval"]),
            ("images", f"{result['examples']:,} of {result['dataset']} ({result['source']})"),
            ("loss", f"{result['loss']:.4f}"),
            ("calibration error", f"{result['calibration_error']:.4f}"),
            ("checkpoint", f"step {result['checkpoint_step']:,}"),
        ]
    )
    if result["anytime"] is not None:
        accuracy, entropy = result["anytime"]["accuracy"], result["anytime"]["entropy"]
        at = sorted({max(1, round(len(accuracy) * share)) for share in ANYTIME_SHARES})
        lines += [
            "",
            "Had each sequence ended after so many steps:",
            "steps read  " + " ".join(f"{step:>7}" for step in at),
        ]
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


def description(run: Run, description: Json, explain: bool = False) -> str:
    """The result of `describe`, without the numbers of the permutation.

    Args:
      run: what is described.
      description: as `describe.describe` makes it.
      explain: tell all fields of the config with their meaning, rather than those alone that differ from the defaults.
    """
    data, shapes = description["data"], description["shapes"]
    sizes = ", ".join(f"{data['sizes'][split]:,} {split}" for split in SPLITS)
    lines = [
        f"Input        {shapes['input']} [batch, time, features] -> logits {shapes['logits']}",
        f"Steps        {description['steps']:,} of {description['batch_size']} examples: "
        f"{description['steps_per_epoch']:,.2f} an epoch, {description['epochs']:.2f} epochs",
        f"Data         {data['name']} from source {data['source']!r}: {sizes}; SHA-256 {data['content_hash'][:12]}",
        f"Protocol     {_protocol(run)}",
        f"Split        {data['split']}",
        f"Scaling      {data['scaling']}",
        f"Permutation  {data['permutation']}: {', '.join(map(str, description['permutation'][:8]))}, ...",
        f"Selection    {data['selection']}: {SELECTIONS.get(data['selection'], TEST_SELECTION)}",
        f"Device       {provenance.device()}",
        f"Recurrence   {description['recurrence']}",
    ]
    if description["remark"]:
        lines += [f"Schedule     {description['remark']}"]
    if names := description["runs"]:
        lines += [f"Sweep        {len(names)} runs: {'; '.join(names)}. The first is described here."]
    if description["trials"]:
        lines += [f"Trials       {description['trials']}"]
    if description["workdir"]:
        lines += [f"Workdir      {description['workdir']}"]
    lines += ["", run.overview(), "", *_fields(description, explain)]
    if data["warning"]:
        lines += ["", f"WARNING: {data['warning']}"]
    return "\n".join(lines)


def _fields(description: Json, explain: bool) -> list[str]:
    """The fields of the config: * given on the command line, + not the default, which is told then."""
    flat, defaults, meanings = configs.flatten(description["config"]), configs.defaults(), configs.meanings()
    told = {name for name in flat if name in description["overridden"] or flat[name] != defaults.get(name)}
    width = max(map(len, flat))
    lines = []
    for name in flat if explain else (name for name in flat if name in told):
        if explain and name in meanings:
            lines += ["", *textwrap.wrap(meanings[name], 77, initial_indent="  # ", subsequent_indent="  # ")]
        sign = "*" if name in description["overridden"] else "+" if name in told else " "
        default = f"  (default {defaults[name]!r})" if flat[name] != defaults.get(name, flat[name]) else ""
        lines.append(f"{sign} {name:<{width}}  {flat[name]!r}{default}")
    heading = "Config: * given here, + differs from configs/default.py"
    rest = [] if explain else [f"{len(flat) - len(told)} other fields have their defaults; --explain tells all."]
    return [heading, *lines, *rest]


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
    """The result of `compare`: each run, the images by who is right about them, the verdict, the warnings."""
    lines = [f"{result['examples']:,} test images of {result['dataset']}, SHA-256 {result['content_hash'][:12]}"]
    for name in ("first", "second"):
        run = result[name]
        facts = [
            (name, run["workdir"]),
            *_accuracy("test", run["accuracy"], run["accuracy_interval"]),
            ("loss", f"{run['loss']:.4f}"),
            ("calibration error", f"{run['calibration_error']:.4f}"),
            ("checkpoint", f"step {run['best_step']:,}, selected on {run['selected_on']}"),
        ]
        lines += ["", *aligned(facts)]
    test = result["mcnemar"]
    counts = [[f"{test[name]:,}" for name in names] for names in (("both", "only_a"), ("only_b", "neither"))]
    rows = [("images", "second right", "second wrong"), ("first right", *counts[0]), ("first wrong", *counts[1])]
    lines += ["", *aligned(rows), "", result["verdict"]]
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
