"""`best/pixel_gru` through the protocol's permutation, `RandomState(92916)`. Results: RESULTS.md."""

import ml_collections

from configs.best import pixel_gru


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = pixel_gru.get_config()
    config.data.permuted = True
    return config
