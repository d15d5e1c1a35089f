"""`best/permuted_gru` with 256 units, a lower rate, more weight decay, and 12 epochs. Results: RESULTS.md."""

import ml_collections

from configs.best import permuted_gru


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = permuted_gru.get_config()
    config.model.hidden_size = 256
    config.optimizer.learning_rate = 5e-3
    config.optimizer.weight_decay = 0.08
    config.train.steps = 10_308
    return config
