"""What a network reaches on permuted pixels that knows no order: an MLP on all 784 values. Results: RESULTS.md.

The yardstick of every recurrent figure on permuted pixels: the permutation changes nothing for it.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = default.get_config()
    config.data.view = "pixel"
    config.data.permuted = True
    config.model.name = "mlp"
    config.model.hidden_size = 272
    config.model.num_layers = 2
    config.model.dropout.output_keep = 0.9
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.weight_decay = 0.1
    config.optimizer.ema_decay = 0.999
    config.optimizer.clip.mask = "all"
    config.optimizer.clip.unit = "group"
    config.train.batch_size = 128
    config.train.steps = 60 * 430
    config.train.eval_every = 2 * 430
    config.train.label_smoothing = 0.1
    config.train.noise = 0.3
    return config
