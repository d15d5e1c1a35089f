"""One linear diagonal recurrence and an MLP on its last state, permuted pixels. Results: RESULTS.md.

The last state is one product with the powers of the diagonal, so 60 epochs take some minutes on two cores.
"""

import ml_collections

from configs.best import permuted_mlp


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = permuted_mlp.get_config()
    config.model.name = "rnn"
    config.model.cell = "diagonal"
    # As many states as tell 784 steps apart, with time constants of about 2,000: all see the whole sequence.
    config.model.cell_options = "{'states': 392, 'shortest': 2.5, 'longest': 2.6}"
    config.model.hidden_size = 256
    config.model.num_layers = 1
    config.model.head_layers = 1
    config.optimizer.learning_rate = 3e-3
    # 784 steps multiply an error of a phase by 784: at the other parameters' rate the states would not stay apart.
    config.optimizer.recurrent_rate = 0.003
    return config
