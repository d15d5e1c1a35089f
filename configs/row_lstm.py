"""The tutorial's second model: a tidier LSTM on rows."""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = default.get_config()
    config.data.view = "row"
    config.model.cell = "lstm"
    config.model.hidden_size = 64
    config.model.forget_bias = 1.0
    config.model.norm = "frozen"
    config.model.dense_init = "orthogonal"
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 0.02
    config.optimizer.clip.norm = 2.0
    config.optimizer.clip.mask = "recurrent"
    config.optimizer.clip.unit = "tensor"
    config.train.batch_size = 32
    config.train.steps = 5000
    config.train.eval_every = 250
    return config
