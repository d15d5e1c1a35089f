"""The whole training step of a config, here and in PyTorch.

    python -m benchmarks.end_to_end [--configs=pixel_gru,row_lstm] [--json=FILE]

Batches cut from the training set in memory, scaling, model, loss, backward pass, clip and RMSProp (see
`benchmarks.trainers`): milliseconds a step, in alternating rounds of real training.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging

from benchmarks import peers, timing, trainers

FLAGS = flags.FLAGS
Row = dict[str, Any]

# What changes in the config: name -> (trainer, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("ours", {}),
    "ours_bfloat16": ("ours", {"model.precision": "bfloat16"}),
    "torch": ("torch", {}),
}


def build(variant: str, config: ml_collections.ConfigDict) -> trainers.Trainer:
    """A variant's trainer of a config.

    Raises:
      ImportError, peers.Unavailable: it can't be had here.
    """
    library, changes = VARIANTS[variant]
    changed = config.copy_and_resolve_references()
    for field, value in changes.items():
        if field.split(".")[1] not in config.model:
            raise peers.Unavailable(f"no config field {field}")
        changed.update_from_flattened_dict({field: value})
    return trainers.TRAINERS[library](changed)


def measure(
    name: str, config: ml_collections.ConfigDict, variants: Sequence[str], *, rounds: int = 7, seconds: float = 2.0
) -> list[Row]:
    """One row for each variant of one config; `rounds` and `seconds` as in `timing.alternate`."""
    print(name, flush=True)
    found: dict[str, timing.Program] = {}
    for variant in variants:
        try:
            found[variant] = build(variant, config).advance
        except (ImportError, peers.Unavailable) as error:
            print(f"  {variant} left out: {error}")
    timings = timing.alternate(found, rounds=rounds, seconds=seconds)
    ours = timings.get("ours")
    return [
        {
            "config": name,
            "library": variant,
            **took.facts(),
            "against_ours": None if ours is None else took.median / ours.median,
        }
        for variant, took in timings.items()
    ]


def define_flags() -> None:
    """The flags of this module as a command."""
    flags.DEFINE_list("configs", ["pixel_gru", "row_lstm"], "Names in configs/.")
    timing.define_names("variants", list(VARIANTS), "Which trainings.")
    flags.DEFINE_string("source", "auto", "The config's data.source.")
    # As long as a dispatch in training.
    timing.define_measuring(rounds=7, seconds=2.0)


def main(argv: list[str]) -> None:
    """Measures and prints the table."""
    del argv
    logging.set_verbosity(logging.ERROR)
    rows = []
    for name in FLAGS.configs:
        config = importlib.import_module(f"configs.{name}").get_config()
        config.data.source = FLAGS.source
        rows += measure(name, config, FLAGS.variants, rounds=FLAGS.rounds, seconds=FLAGS.seconds)
    timing.write_json(FLAGS.json, {"rows": rows})
    print(f"\n{timing.facts()['device']}\n")
    names = ("config", "library", "milliseconds", "lower_quartile", "upper_quartile", "against_ours")
    print(timing.markdown([name.replace("_", " ") for name in names], [[row[name] for name in names] for row in rows]))


if __name__ == "__main__":
    define_flags()
    app.run(main)
