"""Draws the speed of the training step from the figures of `benchmarks.recurrence`.

    python -m benchmarks.plot --json=FILE[,FILE ...] [--out=docs/speed] [--cell=gru]

A panel for each batch size, each with its own scale; the floor is a dashed line. Writes OUT.png,
without a background and in colours that can be read on a light and on a dark page.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

FLAGS = flags.FLAGS
Row = dict[str, Any]

# name in the figures: (label, colour)
BARS = {
    "ours": ("this repository, float32", "#2f81f7"),
    "ours_bfloat16": ("this repository, bfloat16", "#79b8ff"),
    "torch": ("PyTorch", "#e5664b"),
    "flax": ("Flax", "#3fa45b"),
    "keras": ("Keras on JAX", "#d4a72c"),
    "haiku": ("Haiku", "#a371d9"),
    "equinox": ("Equinox", "#b5827a"),
}
INK = "#808890"


def select(rows: Sequence[Row], cell: str, hidden: int, steps: int) -> list[Row]:
    """The training steps of one shape, of the libraries that are drawn."""
    wanted = {"cell": cell, "hidden": hidden, "steps": steps, "kind": "step", "replicas": 1}
    return [row for row in rows if row["library"] in BARS and all(row[name] == value for name, value in wanted.items())]


def draw(rows: Sequence[Row], title: str) -> Any:
    """A matplotlib figure of rows that differ in library and batch."""
    from matplotlib.figure import Figure

    libraries = [library for library in BARS if any(row["library"] == library for row in rows)]
    batches = sorted({row["batch"] for row in rows})
    took = {(row["library"], row["batch"]): row["milliseconds"] for row in rows}
    floors = {row["batch"]: row["floor_milliseconds"] for row in rows}
    figure = Figure(figsize=(3.2 * len(batches), 4.2), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        for place, library in enumerate(libraries):
            if (library, batch) in took:
                label, colour = BARS[library]
                bar = panel.bar(place, took[library, batch], color=colour, label=label)
                panel.bar_label(
                    bar,
                    fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.3g}",
                    color=INK,
                    fontsize=8,
                    padding=2,
                )
        panel.axhline(floors[batch], color=INK, linestyle="dashed", label="the matrix products alone")
        panel.set_title(f"batch {batch}", color=INK, fontsize=10)
        panel.set_xticks([])
        panel.tick_params(colors=INK)
        for side, spine in panel.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
    panels[0].set_ylabel("milliseconds a step", color=INK)
    figure.suptitle(title, color=INK, fontsize=11)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, frameon=False, labelcolor=INK, fontsize=8, ncols=4, loc="outside lower center"
    )
    return figure


def define_flags() -> None:
    """The flags of this module as a command."""
    flags.DEFINE_list("json", None, "What benchmarks.recurrence wrote, perhaps in several runs.", required=True)
    flags.DEFINE_string("out", "docs/speed", "The files to write, without their endings.")
    flags.DEFINE_string("cell", "gru", "The cell.")
    flags.DEFINE_integer("hidden", 128, "Hidden units.")
    flags.DEFINE_integer("steps", 784, "Time steps.")


def main(argv: list[str]) -> None:
    """Reads, draws and writes."""
    del argv
    contents = [json.loads(Path(name).read_text()) for name in FLAGS.json]
    rows = select([row for content in contents for row in content["rows"]], FLAGS.cell, FLAGS.hidden, FLAGS.steps)
    if not rows:
        raise app.UsageError(
            f"{', '.join(FLAGS.json)} has no training steps of {FLAGS.cell}, {FLAGS.hidden}, {FLAGS.steps}."
        )
    title = f"Training step, {FLAGS.cell.upper()} {FLAGS.hidden}, {FLAGS.steps} steps; {contents[0]['device']}"
    figure = draw(rows, title)
    out = Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_name(f"{out.name}.png"), dpi=160, transparent=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
