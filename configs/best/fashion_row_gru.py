"""`best/row_gru` on Fashion-MNIST, the tutorial's part 4. Results: RESULTS.md."""

import ml_collections

from configs.best import row_gru


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = row_gru.get_config()
    config.data.name = "fashion_mnist"
    return config
