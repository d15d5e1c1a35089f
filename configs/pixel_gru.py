"""The tutorial's third model: a GRU that reads a digit pixel by pixel, made dependable.

The tutorial's recipe (Adam 0.002 with beta1 0.1, all gates starting alike) stays at chance for
hundreds to thousands of steps, depending on the seed. Three things differ here:

- the update gates start with time scales spread log-uniformly from 2 steps to all 784, so some
  unit remembers the first pixel from the start;
- RMSProp (TF1's) with a rate of 8e-3, warmed up over 100 steps, then a cosine down to 1 %;
- the clip, by the layer's joint norm as cuDNN's one buffer has it, is on the recurrent
  parameters only.

Result on MNIST, test accuracy, seeds 10 to 14: 98.5, 98.5, 98.2, 98.2, 98.5 % in float32,
98.4, 98.4, 98.5, 98.5, 98.3 % with `--config.model.precision=bfloat16`. Training took 8.3 and 4.6 minutes on one core.
Adam with the same initialisation, rate and schedule (`--config.optimizer.name=adam`) reached 98.2 % with seed 10
on the `scan` backend. Seeds differ as much, so the RMSProp of the second model, `row_lstm`, stays.
"""

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
