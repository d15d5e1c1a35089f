"""`best/pixel_gru` for 60 epochs, in larger batches, with noise on the pixels. Results: RESULTS.md.

The learning rate, weight decay and dropout are larger too.
"""

import ml_collections

from configs.best import pixel_gru


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = pixel_gru.get_config()
    config.model.dropout.output_keep = 0.5
    config.optimizer.learning_rate = 1.2e-2
    config.optimizer.weight_decay = 0.1
    config.train.noise = 0.2
    config.train.batch_size = 128
    config.train.steps = 60 * 430
    config.train.eval_every = 430
    return config
