r"""The bake-off: published cells under one protocol, on permuted pixels.

    python launch.py --config configs/bakeoff.py --workdir runs/bakeoff

All models have about 68,000 parameters with the output layer, as an LSTM of 128 units has (a linear classifier has what
it has). All train for 10 epochs in batches of 128 by AdamW, with half an epoch of warm-up, a cosine, and a clip by the
global norm. The learning rate is chosen for each among the same three by the validation images, in trials of two
epochs. Each then trains with three seeds; of each run the checkpoint that is best by validation is tested once.

Results: docs/bakeoff.md. A part of the models, as those that a GPU has kernels for, in a folder of its own:

    python launch.py --config configs/bakeoff.py --workdir runs/bakeoff_gpu \
        --config.sweep="$(python -c 'from configs import bakeoff; print(bakeoff.sweep_of("lstm", "gru"))')"
"""

from collections.abc import Sequence
from typing import Any

import ml_collections

from configs import default

# Two epochs of 55,000 images are 860 steps, half an epoch 215.
HALF_EPOCH = 215
SEEDS = (1, 2, 3)
RATES = (1e-3, 4e-3, 1.6e-2)

# What makes a model, in this order; its values where a model says nothing are those of configs/default.py.
FIELDS = {
    "model.name": "rnn",
    "model.cell": "lstm",
    "model.hidden_size": 64,
    "model.num_layers": 1,
    "model.head_layers": 0,
    "model.gate_bias": "constant",
    "model.cell_options": "",
}


def _model(**values: Any) -> tuple[Any, ...]:
    return tuple(values.get(field.removeprefix("model."), nothing) for field, nothing in FIELDS.items())


def _gated(cell: str, hidden_size: int, num_layers: int = 1) -> tuple[Any, ...]:
    """A cell whose keeping gates start with time scales from two steps to all 784; all alike, they learn far later."""
    return _model(cell=cell, hidden_size=hidden_size, num_layers=num_layers, gate_bias="log_uniform")


# A line for each model. Published numbers of a cell are its defaults (docs/cells.md); what differs is said here.
MODELS = {
    "lstm": _gated("lstm", 128),
    "gru": _gated("gru", 148),
    "gru_reset_before": _gated("gru_reset_before", 148),
    "peephole_lstm": _gated("peephole_lstm", 128),
    # The refined gates begin as published, even in (1/d, 1 - 1/d).
    "ur_lstm": _model(cell="ur_lstm", hidden_size=128),
    "ur_gru": _model(cell="ur_gru", hidden_size=128),
    # These have few parameters in a layer that reads one value a step: two layers.
    "min_gru": _gated("min_gru", 180, num_layers=2),
    "min_lstm": _gated("min_lstm", 148, num_layers=2),
    "ind_rnn": _model(cell="ind_rnn", hidden_size=252, num_layers=2),
    "elman": _model(cell="elman", hidden_size=256),
    "exp_rnn": _model(cell="exp_rnn", hidden_size=356),
    "cornn": _model(cell="cornn", hidden_size=180),
    "lem": _model(cell="lem", hidden_size=128),
    # One layer of these is linear in x, and so would be the whole network: two blocks as those of their papers. The
    # LRU's ring is close to the circle, so that the first pixel is remembered.
    "lru": _model(
        name="deep", cell="lru", hidden_size=68, num_layers=2, cell_options="{'r_min': 0.9, 'r_max': 0.9999}"
    ),
    "s5": _model(name="deep", cell="s5", hidden_size=68, num_layers=2),
    # One linear layer, with an MLP on its last state.
    "diagonal": _model(cell="diagonal", hidden_size=128, head_layers=1, cell_options="{'states': 192}"),
    # Yardsticks that never see an order, and so read permuted pixels as well as any.
    "mlp": _model(name="mlp", hidden_size=78, num_layers=2),
    "linear": _model(name="linear"),
}


def sweep_of(*names: str, seeds: Sequence[int] = SEEDS) -> str:
    """config.sweep of these models."""
    return repr({", ".join(FIELDS): tuple(MODELS[name] for name in names), "seed": tuple(seeds)})


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = default.get_config()
    config.sweep = sweep_of(*MODELS)
    config.choose = repr({"optimizer.learning_rate": RATES})
    config.choose_steps = 4 * HALF_EPOCH
    config.data.view = "pixel"
    config.data.permuted = True
    config.optimizer.name = "adamw"
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = HALF_EPOCH
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip.norm = 1.0
    config.optimizer.clip.mask = "all"
    config.optimizer.clip.unit = "group"
    config.train.batch_size = 128
    config.train.steps = 20 * HALF_EPOCH
    config.train.eval_every = HALF_EPOCH
    return config
