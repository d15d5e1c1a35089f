"""Diagonal recurrences in a deep stack that gets shorter, pixels in order. Results: RESULTS.md.

Three stages read 784, 196 and 49 steps T. The phases of their states are (k + 1/2) 2 pi / T. 169,000 parameters.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = default.get_config()
    config.data.view = "pixel"
    config.model.name = "deep"
    config.model.cell = "diagonal"
    config.model.cell_options = "{'states': 64}"
    config.model.stages = "32x1, 64x2, 128x1"
    config.model.reading = "mean"
    config.model.dropout.output_keep = 0.9
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.recurrent_rate = 0.25
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.warmup_steps = 430
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip.mask = "all"
    config.optimizer.clip.unit = "group"
    config.train.batch_size = 64
    config.train.steps = 20 * 860
    config.train.eval_every = 860
    config.train.label_smoothing = 0.1
    config.train.noise = 0.1
    return config
