"""The training state: all that determines the rest of a run, and the metrics that are gathered in it."""

import dataclasses
from typing import Any

import clu.metrics
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqmnist_jax.models.reading import Variables
from seqmnist_jax.workdir.checkpoints import Checkpoints, Parts

Array = jax.Array


@flax.struct.dataclass
class EvalMetrics(clu.metrics.Collection):
    """Means over examples of the cross-entropy (in nats) and of the accuracy."""

    loss: clu.metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: clu.metrics.Accuracy


@flax.struct.dataclass
class TrainMetrics(clu.metrics.Collection):
    """The same over the training batches since the last report, and what the clip saw.

    gradient_norm is the mean norm of all gradients before the clip, clipped_share the share of
    steps in which it changed any tensor.
    """

    # Said again, because a clu Collection sees only the fields of its own class.
    loss: clu.metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: clu.metrics.Accuracy
    gradient_norm: clu.metrics.Average.from_output("gradient_norm")  # type: ignore[valid-type]
    clipped_share: clu.metrics.Average.from_output("is_clipped")  # type: ignore[valid-type]


class TrainState(flax.struct.PyTreeNode):
    """All that determines the rest of a run.

    Attributes:
      step: int32, the number of steps done.
      params: the model's parameters.
      batch_stats: the norm layer's moving mean and variance, {} without one.
      opt_state: the optimiser's state.
      key: the run's key; streams of randomness are folded from it and never split off in sequence.
      metrics: training metrics gathered since the last report.
      gradient_norms: of the last steps, the norm of each tensor's gradient before and after
        the clip, float32 [window, 2, tensors]; step k stands in row k % window.
      ema_params: the moving average of the parameters, which is then what is evaluated; None when unused.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    key: Array
    metrics: TrainMetrics
    gradient_norms: Array
    ema_params: Any = None

    @property
    def variables(self) -> Variables:
        """What the model is applied to where it is measured."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}

    def split(self) -> Parts:
        """The state as trees of plain arrays: what the model needs, and what only training needs.

        Apart, so that either may change its form alone.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["key"] = jax.random.key_data(self.key)
        model = {name: fields.pop(name) for name in ("params", "batch_stats", "ema_params")}
        return {"model": model, "training": fields}

    def shapes(self) -> Parts:
        """What `split` gives, as shapes."""
        return jax.eval_shape(TrainState.split, self)


def restore_state(checkpoints: Checkpoints, step: int, template: TrainState) -> TrainState:
    """The state at a checkpoint, on this process's first device.

    Args:
      checkpoints: those of the run.
      step: that of one of them.
      template: a state with the right tree, shapes and dtypes (of arrays or shapes).

    Raises:
      CheckpointError: as `Checkpoints.restore`.
    """
    parts = checkpoints.restore(step, template.shapes())
    training = {**parts["training"], "key": jax.random.wrap_key_data(parts["training"]["key"])}
    return template.replace(**parts["model"], **training)


def restore_variables(checkpoints: Checkpoints, step: int, template: TrainState) -> Variables:
    """Only what the model needs of the state at a checkpoint; arguments and errors as in `restore_state`."""
    return template.replace(**checkpoints.restore(step, {"model": template.shapes()["model"]})["model"]).variables


# The streams of randomness that are folded from a run's key.
INIT_STREAM, DATA_STREAM, DROPOUT_STREAM, LENGTH_STREAM, NOISE_STREAM = range(5)


def data_key(state: TrainState) -> Array:
    """The key of the stream of examples."""
    return jax.random.fold_in(state.key, DATA_STREAM)


@jax.jit
def eval_metrics(logits: Array, labels: Array) -> EvalMetrics:
    """Metrics of logits [count, classes] against integer labels [count]."""
    labels = labels.astype(jnp.int32)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return EvalMetrics.single_from_model_output(loss=loss, logits=logits, labels=labels)


def as_numbers(metrics: clu.metrics.Collection) -> dict[str, float]:
    """A collection's values as Python floats, each the shortest decimal that names the float32."""
    return {name: float(str(np.float32(value))) for name, value in metrics.compute().items()}
