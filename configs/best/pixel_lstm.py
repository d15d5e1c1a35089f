"""`best/pixel_gru` with an LSTM (forget bias b ~ U(0, log 784), input bias -b), regularised less. RESULTS.md has it."""

import ml_collections

from configs.best import pixel_gru


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = pixel_gru.get_config()
    config.model.cell = "lstm"
    config.model.dropout.output_keep = 0.8
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.01
    return config
