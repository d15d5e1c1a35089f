"""How time and memory of a recurrent layer's training step grow with each of its sizes.

    python -m benchmarks.scaling --folder=DIR [--axes=steps,batch] [--libraries=ours,torch] ...

From a GRU with hidden 128, 784 steps of one feature, batch 32 and one replica (flags change these),
one size at a time takes the values below. Memory is what XLA sets aside for a step's temporary
buffers; a step that does not fit is compiled, not run. The folder gets scaling.json and scaling.png.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks import floor, peers, recurrence, timing
from benchmarks.peers import Case

FLAGS = flags.FLAGS
Row = dict[str, Any]

AXES: dict[str, tuple[int, ...]] = {
    "steps": (28, 128, 784, 4096, 16384, 65536),
    "batch": (1, 8, 32, 128, 512),
    "hidden": (32, 64, 128, 256, 512),
    "replicas": (1, 2, 4, 8, 16),
}
# Repetitions in one dispatch, at least.
LEAST = 2
LIBRARIES = ("ours", "ours_bfloat16", "ours_remat", "ours_scan", "torch")


def measure(base: Case, axis: str, values: Iterable[int], libraries: Sequence[str], **options: Any) -> list[Row]:
    """One row for each value and library; the time is None where the step could not be run.

    Args:
      base: the sizes that stay.
      axis, values: the size that grows, and how.
      libraries: which.
      **options: those of `timing.alternate`.
    """
    rows: list[Row] = []
    for value in values:
        case = Case(**{**base._asdict(), axis: value})
        print(f"{axis} {value}", flush=True)
        layers = {library: peers.build(library, case) for library in libraries}
        found = {library: layer.measurable("step") for library, layer in layers.items() if layer is not None}
        runs = {library: each.run for library, each in found.items() if recurrence.fits(library, each, case)}
        timings = timing.alternate(runs, least=LEAST, **options)
        for library, each in found.items():
            took = timings[library].facts() if library in timings else {"milliseconds": None}
            rows.append({"axis": axis, **case._asdict(), "library": library, **took, "temp_bytes": each.temp_bytes})
    return rows


def draw(rows: Sequence[Row], title: str, folder: Path) -> None:
    """Draws scaling.png: time above, memory below, a column for each size."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    quantities = {"milliseconds": ("milliseconds a step", 1.0), "temp_bytes": ("temporary memory, MiB", 2.0**-20)}
    figure = Figure(figsize=(3.2 * len(axes) + 1, 6), layout="constrained")
    panels = figure.subplots(len(quantities), len(axes), sharex="col", sharey="row", squeeze=False)
    for panel_row, (quantity, (label, unit)) in zip(panels, quantities.items(), strict=True):
        for panel, axis in zip(panel_row, axes, strict=True):
            for library in dict.fromkeys(row["library"] for row in rows):
                points = [
                    (row[axis], unit * row[quantity])
                    for row in rows
                    if row["axis"] == axis and row["library"] == library and row[quantity]
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), marker="o", label=library)
            values = sorted({row[axis] for row in rows if row["axis"] == axis})
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(values, [str(value) for value in values], minor=False)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel_row[0].set_ylabel(label)
    for panel, axis in zip(panels[-1], axes, strict=True):
        panel.set_xlabel(axis)
    panels[0][0].legend()
    figure.suptitle(title)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "scaling.png", dpi=150)


def define_flags() -> None:
    """The flags of this module as a command."""
    flags.DEFINE_string("folder", None, "Where the results go.", required=True)
    flags.DEFINE_enum("cell", "gru", list(floor.GATES), "The cell.")
    for name, usual in recurrence.BASE.items():
        flags.DEFINE_integer(name, usual, "The size where another one grows.")
    timing.define_names("axes", list(AXES), "Which sizes grow.")
    timing.define_names("libraries", list(peers.LIBRARIES), "Which libraries.", usual=LIBRARIES)
    flags.DEFINE_integer("largest", max(AXES["steps"]), "Values above this are left out.")
    flags.DEFINE_integer("rounds", 3, "Measurements of each; the median counts.")
    flags.DEFINE_float("seconds", 0.5, "How long a measurement lasts, about.")
    flags.DEFINE_float("budget", 300.0, "Seconds for one library and value; what would take longer is left out.")


def main(argv: list[str]) -> None:
    """Measures, writes and draws after each size."""
    del argv
    base = recurrence.case(FLAGS.cell, FLAGS.hidden, FLAGS.steps, FLAGS.batch)
    folder = Path(FLAGS.folder)
    rows: list[Row] = []
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {name: FLAGS[name].value for name in ("rounds", "seconds", "budget")}
    for axis in FLAGS.axes:
        values = [value for value in AXES[axis] if value <= FLAGS.largest]
        rows += measure(base, axis, values, FLAGS.libraries, **options)
        timing.write_json(str(folder / "scaling.json"), {"rows": rows, "base": base._asdict()})
    try:
        draw(rows, f"Training step of {recurrence.words(base)}; {timing.facts()['device']}", folder)
    except ImportError as error:
        print(f"No plot: {error}")
    header = ["axis", "value", "library", "milliseconds", "temporary MiB"]
    body = [
        [
            row["axis"],
            row[row["axis"]],
            row["library"],
            row["milliseconds"],
            row["temp_bytes"] and row["temp_bytes"] / 2**20,
        ]
        for row in rows
    ]
    print(timing.markdown(header, body))


if __name__ == "__main__":
    define_flags()
    app.run(main)
