"""A deep stack of diagonal recurrences that soon reads rows in place of pixels, for 40 epochs. Results: RESULTS.md.

One narrow block reads all 784 steps; then the 28 steps of a row of pixels become one, and three wide blocks read 28.
"""

import ml_collections

from configs.best import pixel_deep


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = pixel_deep.get_config()
    config.model.cell_options = "{'states': 32}"
    config.model.stages = "16x1, 128x3"
    config.model.shorten = 28
    config.model.dropout.output_keep = 0.8
    config.optimizer.learning_rate = 6e-3
    config.optimizer.recurrent_rate = 0.01
    config.optimizer.weight_decay = 0.1
    config.optimizer.ema_decay = 0.999
    config.train.steps = 40 * 860
    return config
