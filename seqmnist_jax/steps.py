"""The training state, one pure training step over it, many of them in one program, evaluation.

Every function here is pure: what a step does follows from the state (which counts the
steps and holds the key), the hyperparameters and the data.
"""

from collections.abc import Callable
from typing import Any

import clu.metrics
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from seqmnist_jax.optimizers import Hyperparameters, MakeOptimizer

Array = jax.Array
Variables = dict[str, Any]
Preprocess = Callable[[Array], Array]


@flax.struct.dataclass
class EvalMetrics(clu.metrics.Collection):
    """Means over examples of the cross-entropy (in nats) and of the accuracy."""

    loss: clu.metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: clu.metrics.Accuracy


@flax.struct.dataclass
class TrainMetrics(clu.metrics.Collection):
    """The same over the training batches since the last report, and the mean gradient norm before the clip."""

    # Said again, because a clu Collection sees only the fields of its own class.
    loss: clu.metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: clu.metrics.Accuracy
    gradient_norm: clu.metrics.Average.from_output("gradient_norm")  # type: ignore[valid-type]


class TrainState(flax.struct.PyTreeNode):
    """All that determines the rest of a run.

    Attributes:
      step: int32, the number of steps done.
      params: the model's parameters.
      batch_stats: the norm layer's moving mean and variance, {} without one.
      opt_state: the optimiser's state.
      key: the run's key; streams of randomness are folded from it and never split off in sequence.
      metrics: training metrics gathered since the last report.
      ema_params: reserved for averaged parameters; None when unused.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    key: Array
    metrics: TrainMetrics
    ema_params: Any = None

    @property
    def variables(self) -> Variables:
        """What the model is applied to."""
        return {"params": self.params, "batch_stats": self.batch_stats}


# The streams of randomness that are folded from a run's key.
INIT_STREAM, DATA_STREAM = 0, 1


def init_state(
    seed: Array | int, model: nn.Module, make_optimizer: MakeOptimizer, hyper: Hyperparameters, example: Array
) -> TrainState:
    """The state before the first step.

    Args:
      seed: an integer; all of a run's randomness follows from it.
      model: ``model.init(key, x)`` and ``model.apply(variables, x, train=...)``.
      make_optimizer, hyper: as in `optimizers`.
      example: one input [1, time, features], of which only shape and dtype matter.
    """
    key = jax.random.key(seed)
    variables = model.init(jax.random.fold_in(key, INIT_STREAM), example)
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=make_optimizer(hyper).init(variables["params"]),
        key=key,
        metrics=TrainMetrics.empty(),
    )


def data_key(state: TrainState) -> Array:
    """The key of the stream of examples."""
    return jax.random.fold_in(state.key, DATA_STREAM)


def _loss(model: nn.Module, params: Any, batch_stats: Any, x: Array, labels: Array) -> tuple[Array, tuple[Array, Any]]:
    """Mean cross-entropy of a batch; beside it the logits and the new norm statistics."""
    logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
    )
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits, updated.get("batch_stats", {}))


def train_step(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    state: TrainState,
    hyper: Hyperparameters,
    x: Array,
    labels: Array,
) -> tuple[TrainState, Array]:
    """One step on one batch.

    Args:
      model, make_optimizer: what is trained and how (static).
      state, hyper: where training stands, and the optimiser's numbers.
      x: [batch, time, features].
      labels: integers [batch].

    Returns:
      The new state, and whether the loss, the gradient and what they lead to are finite.
      Where not, the state is the old one, step count included: a run that diverges stands
      still.
    """
    compute = jax.value_and_grad(lambda params: _loss(model, params, state.batch_stats, x, labels), has_aux=True)
    (loss, (logits, batch_stats)), gradients = compute(state.params)
    gradient_norm = optax.tree.norm(gradients)
    updates, opt_state = make_optimizer(hyper).update(gradients, state.opt_state, state.params)
    metrics = TrainMetrics.single_from_model_output(
        loss=loss, logits=logits, labels=labels, gradient_norm=gradient_norm
    )
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(optax.tree.norm((params, batch_stats)))
    new = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        metrics=state.metrics.merge(metrics),
    )
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state), finite


def train_steps(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    preprocess: Preprocess,
    batch_size: int,
    state: TrainState,
    hyper: Hyperparameters,
    images: Array,
    labels: Array,
    orders: Array,
    offset: Array,
    count: Array,
) -> tuple[TrainState, Array]:
    """Up to `count` steps as one loop on the device.

    Args:
      model, make_optimizer, preprocess, batch_size: static; `preprocess` makes sequences of images.
      state, hyper: as in `train_step`.
      images, labels: the whole training set, uint8 [size, height, width] and [size].
      orders, offset: as `ExampleStream.window` gives them for ``state.step``.
      count: how many steps; traced, so one program serves all counts.

    Returns:
      The state after `count` steps, or before the first step that was not finite; and
      whether all were finite.
    """

    def more(loop: tuple[Array, TrainState, Array]) -> Array:
        done, _, finite = loop
        return (done < count) & finite

    def one(loop: tuple[Array, TrainState, Array]) -> tuple[Array, TrainState, Array]:
        done, state, _ = loop
        batch = jax.lax.dynamic_slice(orders, (offset + done * batch_size,), (batch_size,))
        state, finite = train_step(
            model, make_optimizer, state, hyper, preprocess(images[batch]), labels[batch].astype(jnp.int32)
        )
        return done + 1, state, finite

    _, state, finite = jax.lax.while_loop(more, one, (jnp.int32(0), state, jnp.bool_(True)))
    return state, finite


def predict_logits(
    model: nn.Module, preprocess: Preprocess, batch_size: int, variables: Variables, images: Array
) -> Array:
    """Logits [count, classes] of images uint8 [count, height, width], `batch_size` at a time."""

    count = images.shape[0]
    batch_size = min(batch_size, count)
    batches = -(-count // batch_size)
    padded = jnp.pad(images, ((0, batches * batch_size - count), (0, 0), (0, 0)))
    logits = jax.lax.map(
        lambda batch: model.apply(variables, preprocess(batch), train=False),
        padded.reshape(batches, batch_size, *images.shape[1:]),
    )
    return logits.reshape(batches * batch_size, -1)[:count]


@jax.jit
def eval_metrics(logits: Array, labels: Array) -> EvalMetrics:
    """Metrics of logits [count, classes] against integer labels [count]."""
    labels = labels.astype(jnp.int32)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return EvalMetrics.single_from_model_output(loss=loss, logits=logits, labels=labels)


def as_numbers(metrics: clu.metrics.Collection) -> dict[str, float]:
    """A collection's values as Python floats, each the shortest decimal that names the float32."""
    return {name: float(str(np.float32(value))) for name, value in metrics.compute().items()}


def gradient_report(
    model: nn.Module, preprocess: Preprocess, state: TrainState, images: Array, labels: Array
) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch and the largest absolute gradient of each tensor, by its path."""
    x = preprocess(images)
    compute = jax.value_and_grad(lambda params: _loss(model, params, state.batch_stats, x, labels), has_aux=True)
    (loss, _), gradients = compute(state.params)
    leaves = jax.tree_util.tree_flatten_with_path(gradients)[0]
    return loss, {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.abs(leaf).max() for path, leaf in leaves}
