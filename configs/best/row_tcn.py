"""`best/pixel_tcn` on rows, 3 levels: a receptive field of 85 steps, of which a digit has 28. Results: RESULTS.md."""

import ml_collections

from configs.best import pixel_tcn


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = pixel_tcn.get_config()
    config.data.view = "row"
    config.model.num_layers = 3
    config.train.steps = 8590
    return config
