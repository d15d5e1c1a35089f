"""`best/permuted_gru_256` for 24 epochs, in larger batches, with noise on the pixels. Results: RESULTS.md.

The learning rate and weight decay are larger too.
"""

import ml_collections

from configs.best import permuted_gru_256


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = permuted_gru_256.get_config()
    config.optimizer.learning_rate = 6e-3
    config.optimizer.weight_decay = 0.1
    config.train.noise = 0.2
    config.train.batch_size = 128
    config.train.steps = 24 * 430
    config.train.eval_every = 430
    return config
