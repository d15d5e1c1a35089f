"""One diagonal recurrence to 98 % of the validation images, permuted pixels, on two CPU cores. docs/speedrun.md."""

import ml_collections

from configs.best import permuted_diagonal


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = permuted_diagonal.get_config()
    config.train.steps = 10 * 430
    config.train.eval_every = 215
    return config
