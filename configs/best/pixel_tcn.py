"""A temporal convolutional network on pixels, the tutorial's part 3. Results: RESULTS.md.

The architecture of Bai, Kolter and Koltun (2018) for this task: 8 levels of 25 channels, kernel 7, weight
norm, dropout 0.05 (67,000 parameters, a receptive field of 3,061 steps), Adam at 2e-3, batches of 64. Here
its 20 epochs run under a warm-up and a cosine, with a clip at 1; the authors' code lowers the rate once, after
epoch 10, and has neither.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = default.get_config()
    config.seed = 1
    config.data.view = "pixel"
    config.model.name = "tcn"
    config.model.hidden_size = 25
    config.model.num_layers = 8
    config.model.kernel_size = 7
    config.model.dropout.output_keep = 0.95
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "warmup_cosine"
    config.optimizer.clip.mask = "all"
    config.optimizer.clip.unit = "group"
    config.train.batch_size = 64
    config.train.steps = 17_190
    config.train.eval_every = 859
    return config
