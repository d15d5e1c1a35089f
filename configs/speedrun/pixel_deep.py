"""A deep stack of diagonal recurrences to 99 % of the validation images on two CPU cores. docs/speedrun.md.

One narrow block reads all 784 steps; then the 28 steps of a row of pixels become one, and two wide blocks read 28.
"""

import ml_collections

from configs.best import pixel_deep


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = pixel_deep.get_config()
    config.model.cell_options = "{'states': 32}"
    config.model.stages = "16x1, 128x2"
    config.model.shorten = 28
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 300
    config.train.noise = 0.0
    config.train.steps = 6 * 860
    config.train.eval_every = 215
    return config
