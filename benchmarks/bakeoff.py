"""The page of the bake-off, and its plot of test accuracy against training time.

    python -m benchmarks.bakeoff [--results=results/bakeoff] [--out=docs/bakeoff]

Reads the summaries of the runs under --results, of one sweep or of several made in parts, and writes OUT.md, behind the
introduction there, and OUT.svg where matplotlib is installed. Without runs the page says so.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.plot import INK
from seqmnist_jax.analysis import results_page, table
from seqmnist_jax.errors import UsageError
from seqmnist_jax.models.build import model_title
from seqmnist_jax.training.plan import choice_in_words
from seqmnist_jax.workdir import files

FLAGS = flags.FLAGS
Row = dict[str, Any]

TARGETS = (90, 95, 98)
HEADER = ["Row", "Model", "Parameters", "Rate", "Epochs", "Seeds", "Validation, %", "Test, %", "Least to largest"]
HEADER += [*(f"{target} %" for target in TARGETS), "Training", "Device"]
COLOURS = ("#2f81f7", "#e5664b", "#3fa45b", "#a371d9")
# The test accuracies, in percent, that the plot names; its scale is that of the logarithm of the errors.
TICKS = (10, 50, 80, 90, 95, 97, 98, 99, 99.5)


def read(folder: Path) -> tuple[list[Row], list[table.Result], list[str]]:
    """The rows of the recipes that have a result, the runs of those that have none, and what is said of others.

    All three are empty where there are no runs.
    """
    if not any(files.under(folder, name) for name in (files.SUMMARY, files.DIVERGED, files.CONFIG)):
        return [], [], []
    found = table.find([str(folder)])
    lost = set(table.without_result(found.results))
    ended = [result for result in found.results if result.folder not in lost]
    diverged = [result for result in found.results if result.folder in lost]
    return table.rows(ended) if ended else [], diverged, found.left_out


def page(rows: Sequence[Row], diverged: Sequence[table.Result], left_out: Sequence[str], plot: str) -> str:
    """The tables, one for each task, in Markdown."""
    if not (rows or diverged or left_out):
        return "There are no results yet.\n"
    text: list[str] = []
    choices: list[str] = []
    # Permuted pixels, which the rules are for and the plot shows, before pixels in order.
    for task in sorted({row["task"] for row in rows}, reverse=True):
        title = re.sub("^mnist", "MNIST", task)
        of_task = [row for row in rows if row["task"] == task]
        text += [f"## {title}", "", results_page.markdown(HEADER, map(_cells, of_task)), ""]
        chosen = [row for row in of_task if row["choice"]]
        rates = [f"- `{row['id']}`, {row['model']}: {choice_in_words(row['choice'])}" for row in chosen]
        choices += [f"{title}:", "", *rates, ""] if chosen else []
    if plot:
        drawn = max(row["task"] for row in rows)
        text += [f"![Test accuracy against training time: {drawn}]({plot})", ""]
    text += [
        "Validation and test: mean ± standard deviation over the seeds, and the least and the largest test accuracy. "
        f"{', '.join(f'{target} %' for target in TARGETS)}: training time until the validation images were first read "
        "so well, measured each half epoch, the mean over the seeds; '-' where one never did. Training time is without "
        "compilation and evaluation; the seeds of a model train together, and a run's time is its share of that. Times "
        "of different devices can't be compared. [RESULTS.md](../RESULTS.md) has the rows by the same names, with "
        "their commands, commits and dates.",
        "",
    ]
    told = [
        f"- {model_title(one.recipe)}, {_rate(one.recipe)}, seed {one.summary['seed']}: diverged." for one in diverged
    ]
    told += [f"- {sentence}" for sentence in (*results_page.warnings(rows, ()), *left_out)]
    if told:
        text += ["## Diverged, unfinished, to be known", "", *told, ""]
    if choices:
        text += ["## How the rates were chosen", "", "Best validation accuracy in the trials.", "", *choices]
    return "\n".join(text)


def _rate(recipe: dict[str, Any]) -> str:
    return f"learning rate {recipe['optimizer.learning_rate']:.4g}"


def _cells(row: Row) -> list[str]:
    told = results_page.result_cells(row)
    return [
        told["Row"],
        row["model"],
        told["Parameters"],
        f"{row['learning_rate']:.4g}",
        told["Epochs"],
        told["Seeds"],
        told["Validation, %"],
        told["Test, %"],
        told["Test, least to largest"],
        *(results_page.duration(row[f"seconds_to_{target}"]) for target in TARGETS),
        results_page.duration(row["train_seconds"]),
        row["device"],
    ]


def draw(rows: Sequence[Row]) -> Any:
    """A matplotlib figure: a point for each row, with the range of its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    panel = figure.subplots()
    for device, colour in zip(dict.fromkeys(row["device"] for row in rows), COLOURS * len(rows), strict=False):
        of_device = [row for row in rows if row["device"] == device]
        seconds = [row["train_seconds"] for row in of_device]
        errors = [1 - row["test_accuracy"] for row in of_device]
        ranges = [
            [mean - (1 - row["test_range"][1]), (1 - row["test_range"][0]) - mean]
            for mean, row in zip(errors, of_device, strict=True)
        ]
        bars = [list(side) for side in zip(*ranges, strict=True)]
        panel.errorbar(seconds, errors, bars, fmt="o", color=colour, label=device, capsize=2)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.invert_yaxis()
    panel.set_yticks([1 - tick / 100 for tick in TICKS], [f"{tick:g}" for tick in TICKS])
    ticks = [step * 10**power for power in range(-1, 6) for step in (1, 2, 5)]
    panel.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    panel.minorticks_off()
    worst, best = (pick(row["test_range"][side] for row in rows) for pick, side in ((min, 0), (max, 1)))
    panel.set_ylim(min(0.95, (1 - worst) * 1.15), max(1e-3, (1 - best) * 0.85))
    seconds = [row["train_seconds"] for row in rows]
    panel.set_xlim(0.8 * min(seconds), 3 * max(seconds))  # room for a name
    panel.set_xlabel("seconds of training, a run", color=INK)
    panel.set_ylabel("test accuracy, %", color=INK)
    panel.tick_params(colors=INK)
    for side, spine in panel.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    panel.legend(loc="lower right", frameon=False, labelcolor=INK, fontsize=8)
    figure.draw_without_rendering()
    # Without the precision, which is the device's.
    names = [row["model"].removesuffix(f", {row['precision']}") for row in rows]
    places = [(row["train_seconds"], 1 - row["test_accuracy"]) for row in rows]
    _name(panel, dict(zip(names, places, strict=True)))
    return figure


def _name(panel: Any, points: dict[str, tuple[float, float]]) -> None:
    """Writes each name beside its point, lower where another's would be in its way."""
    taken: list[tuple[float, float, float]] = []
    per_pixel = 72 / panel.figure.dpi
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        x, y = per_pixel * panel.transData.transform(point)
        width, shift = 4.5 * len(name), 4.0
        while any(abs(y + shift - other) < 10 and x < end and start < x + width for start, end, other in taken):
            shift -= 1
        taken.append((x, x + width, y + shift))
        panel.annotate(name, point, (5, shift), textcoords="offset points", color=INK, fontsize=8)


def write(results: Path, out: Path) -> None:
    """Reads what there is and writes the page, and the plot of the task that comes last: the permuted pixels."""
    rows, diverged, left_out = read(results)
    drawn = [row for row in rows if row["task"] == max(row["task"] for row in rows)]
    path = out.with_suffix(".svg")
    if drawn and importlib.util.find_spec("matplotlib"):
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "bakeoff"}):  # so that the same rows make the same file
            draw(drawn).savefig(path, transparent=True, metadata={"Date": None})
    elif drawn:
        print(f"{path} stays as it is: matplotlib is not installed.")
    text = page(rows, diverged, left_out, path.name if drawn else "")
    out.with_suffix(".md").write_text((results / "introduction.md").read_text() + "\n" + text)


def main(argv: list[str]) -> None:
    """Writes the page and its plot."""
    del argv
    folder = Path(FLAGS.results)
    if not folder.is_dir():
        raise UsageError(f"--results is {FLAGS.results!r}; expected a folder.")
    write(folder, Path(FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_string("results", "results/bakeoff", "The folder of the runs, with introduction.md.")
    flags.DEFINE_string("out", "docs/bakeoff", "The files to write, without their endings.")
    app.run(main)
