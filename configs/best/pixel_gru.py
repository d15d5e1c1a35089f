"""One GRU layer of 128 units on pixels, 20 epochs, regularised. Results: RESULTS.md.

Update gates log-uniform from 2 to 784 steps, AdamW at 8e-3 with warm-up and cosine, a decoupled weight
decay of 0.05, the last output dropped by 0.4, labels smoothed by 0.1, and the moving average of the
parameters (decay 0.999) is what is measured.
"""

import ml_collections

from configs.best import row_gru


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = row_gru.get_config()
    config.data.view = "pixel"
    config.model.num_layers = 1
    config.optimizer.learning_rate = 8e-3
    config.optimizer.weight_decay = 0.05
    config.model.dropout.output_keep = 0.6
    config.train.batch_size = 64
    config.train.steps = 17_190
    config.train.eval_every = 859
    return config
