"""`best/pixel_gru` with an LSTM: forget bias b ~ U(0, log 784), input bias -b. Results: RESULTS.md."""

import ml_collections

from configs.best import pixel_gru


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = pixel_gru.get_config()
    config.model.cell = "lstm"
    config.optimizer.learning_rate = 4e-3
    return config
