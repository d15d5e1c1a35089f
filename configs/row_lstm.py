"""The tutorial's second model: a tidier LSTM on rows.

As in the tutorial: RMSProp 0.02 as TF1 has it, an orthogonal dense kernel, and a norm layer
whose moving statistics never move (`frozen`; `--config.model.norm=batch` is the real batch
normalisation that its text asks for). What differs: the clip by norm is on the recurrent
parameters only, where the tutorial clips the norm layer's too.

Result on MNIST, test accuracy, mean of seeds 1 to 3: 95.8 % with `frozen` (96.07, 96.05, 95.42),
96.7 % with `batch` (96.83, 96.98, 96.22); the tutorial's own graph reaches 95.3 % in TensorFlow
2.21, one seed. 5,000 steps take 4 to 7 s on two cores of an AMD EPYC with AVX-512.
"""

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
