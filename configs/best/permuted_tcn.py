"""`best/pixel_tcn` through the protocol's permutation, `RandomState(92916)`. Results: RESULTS.md."""

import ml_collections

from configs.best import pixel_tcn


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = pixel_tcn.get_config()
    config.data.permuted = True
    return config
