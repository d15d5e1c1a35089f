"""The tutorial's third model: a GRU that reads a digit pixel by pixel, made dependable."""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = default.get_config()
    config.seed = 10
    config.data.view = "pixel"
    config.model.cell = "gru"
    config.model.hidden_size = 128
    config.model.kernel_init = "orthogonal"
    config.model.gate_bias = "log_uniform"
    config.model.dense_init = "orthogonal"
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.clip.norm = 1.0
    config.optimizer.clip.mask = "recurrent"
    config.optimizer.clip.unit = "layer"
    config.train.batch_size = 32
    config.train.steps = 5000
    config.train.eval_every = 250
    return config
