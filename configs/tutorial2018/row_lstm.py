"""The 2018 notebook's second model, to the letter.

As `configs/row_lstm.py`, with the clip by norm on every tensor but the dense layer's, the norm
layer's included, and the checkpoint chosen on the first 128 test images: not comparable with an
honest result. It printed 95.3 % at the last step; here, seed 1: 97.7 % of those 128 (99.2 % at best),
94.2 % of all 10,000.
"""

import ml_collections

from configs import row_lstm


def get_config() -> ml_collections.ConfigDict:
    """The config; see the module's docstring."""
    config = row_lstm.get_config()
    config.model.norm = "frozen"
    config.optimizer.clip.mask = "all_but_dense"
    config.data.protocol = "tutorial2018"
    return config
