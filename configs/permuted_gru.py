"""The tutorial's fourth model: the pixel GRU through one fixed permutation of the pixels."""

import ml_collections

from configs import pixel_gru


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = pixel_gru.get_config()
    config.data.permutation = "numpy:100"
    return config
