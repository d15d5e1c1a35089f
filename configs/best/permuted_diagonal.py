"""One linear diagonal recurrence and an MLP on its last state, permuted pixels. Results: RESULTS.md.

The last state is one product with the powers of the diagonal, so 30 epochs take some minutes on two cores.
"""

import ml_collections

from configs.best import permuted_mlp


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = permuted_mlp.get_config()
    config.model.name = "rnn"
    config.model.cell = "diagonal"
    # Time constants of about 2,000 steps: all states see the whole sequence.
    config.model.cell_options = "{'states': 256, 'shortest': 2.5, 'longest': 2.6}"
    config.model.hidden_size = 256
    config.model.num_layers = 1
    config.model.head_layers = 1
    # A sequence has one feature: to drop it is to drop all of the image.
    config.model.dropout.input_keep = 1.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.recurrent_rate = 0.3
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.999
    config.train.noise = 0.1
    config.train.steps = 30 * 430
    config.train.eval_every = 430
    return config
