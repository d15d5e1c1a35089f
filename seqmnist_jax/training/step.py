"""One pure training step over the state, and many of them in one program.

What a step does follows from the state (which counts the steps and holds the key), the hyperparameters and the data.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from seqmnist_jax.data.views import SequenceView
from seqmnist_jax.devices.mesh import own_share, shards
from seqmnist_jax.devices.trees import tensor_names
from seqmnist_jax.training.optimizers import DROPOUT_PLACES, Hyperparameters, MakeOptimizer, clip_state
from seqmnist_jax.training.state import DROPOUT_STREAM, LENGTH_STREAM, NOISE_STREAM, TrainMetrics, TrainState

Array = jax.Array


class StepSpec(NamedTuple):
    """What a training step is made of: all that is static about it.

    Attributes:
      model: ``model.init(key, x)`` and ``model.apply(variables, x, train=...)``.
      make_optimizer: as in `optimizers`.
      view: how images become sequences.
      batch_size: examples a step.
      drops: the places of variational dropout that are in use.
      min_length: None, or: each training sequence ends at random, after at least so many steps.
      accumulate: into how many parts, one after the other, a batch is divided.
      smooths: whether labels are smoothed.
      noisy: whether noise is added to the sequences.
      data_axis: None, or the axis of a ``shard_map`` over which each batch is divided.
    """

    model: nn.Module
    make_optimizer: MakeOptimizer
    view: SequenceView
    batch_size: int
    drops: frozenset[str] = frozenset()
    min_length: int | None = None
    accumulate: int = 1
    smooths: bool = False
    noisy: bool = False
    data_axis: str | None = None


def _step_key(state: TrainState, stream: int) -> Array:
    """The key of one stream of randomness at this state's step."""
    return jax.random.fold_in(jax.random.fold_in(state.key, stream), state.step)


class Batch(NamedTuple):
    """Sequences [batch, time, features], labels int32 [batch], and lengths int32 [batch] or None."""

    x: Array
    labels: Array
    lengths: Array | None


class Gradients(NamedTuple):
    """What a batch says: its mean loss, logits [batch, classes], new norm statistics, the parameters' gradients."""

    loss: Array
    logits: Array
    batch_stats: Any
    params: Any


def _own(spec: StepSpec, whole: Array) -> Array:
    """This device's share of what there is for each example of a batch, [batch, ...]: its share of each part."""
    parts = whole.reshape(spec.accumulate, -1, *whole.shape[1:])
    share = jax.vmap(lambda part: own_share(part, spec.data_axis))(parts)
    return share.reshape(-1, *whole.shape[1:])


def _draw_batch(spec: StepSpec, state: TrainState, hyper: Hyperparameters, x: Array, labels: Array) -> Batch:
    """The batch with noise on its values, and the lengths at which its sequences end.

    Both are drawn for the whole batch, so that a sequence's do not depend on how many devices share it.
    """
    whole = len(x) * shards(spec.data_axis)
    if spec.noisy:
        noise = jax.random.normal(_step_key(state, NOISE_STREAM), (whole, *x.shape[1:]), x.dtype)
        x = x + hyper.noise * _own(spec, noise)
    if spec.min_length is None:
        return Batch(x, labels, None)
    lengths = jax.random.randint(_step_key(state, LENGTH_STREAM), (whole,), spec.min_length, x.shape[1] + 1)
    return Batch(x, labels, _own(spec, lengths))


@jax.named_scope("loss")
def _cross_entropy(spec: StepSpec, hyper: Hyperparameters, logits: Array, labels: Array) -> Array:
    """The mean cross-entropy against labels, smoothed (Szegedy et al. 2016, sec. 7) where that is on."""
    if not spec.smooths:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    targets = optax.losses.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), hyper.label_smoothing)
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


def _part_gradients(
    spec: StepSpec, params: Any, batch_stats: Any, key: Array, hyper: Hyperparameters, batch: Batch
) -> Gradients:
    """The gradients of one part of a batch."""
    input_keep, output_keep, state_keep = (
        getattr(hyper, place) if place in spec.drops else None for place in DROPOUT_PLACES
    )

    def loss_of(params: Any) -> tuple[Array, tuple[Array, Any]]:
        logits, updated = spec.model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch.x,
            train=True,
            lengths=batch.lengths,
            keep=(input_keep, output_keep, state_keep),
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return _cross_entropy(spec, hyper, logits, batch.labels), (logits, updated.get("batch_stats", {}))

    (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    return Gradients(loss, logits, batch_stats, gradients)


def _gradients(spec: StepSpec, state: TrainState, hyper: Hyperparameters, x: Array, labels: Array) -> Gradients:
    """The gradients of a batch, in one piece or as the mean over its parts.

    Parts need only a part's memory. Without batch norm and dropout the mean is that of the whole batch.
    """
    batch, key = _draw_batch(spec, state, hyper, x, labels), _step_key(state, DROPOUT_STREAM)
    count = spec.accumulate
    if count == 1:
        return _part_gradients(spec, state.params, state.batch_stats, key, hyper, batch)
    parts = jax.tree.map(lambda whole: whole.reshape(count, -1, *whole.shape[1:]), batch)

    def one(carry: tuple[Any, Array, Any], now: tuple[Array, Batch]) -> tuple[tuple[Any, Array, Any], Array]:
        batch_stats, loss, total = carry
        index, part = now
        found = _part_gradients(spec, state.params, batch_stats, jax.random.fold_in(key, index), hyper, part)
        total = jax.tree.map(lambda t, g: t + g / count, total, found.params)
        return (found.batch_stats, loss + found.loss / count, total), found.logits

    zero = jax.tree.map(jnp.zeros_like, state.params)
    (batch_stats, loss, gradients), logits = jax.lax.scan(
        one, (state.batch_stats, jnp.float32(0.0), zero), (jnp.arange(count), parts)
    )
    return Gradients(loss, logits.reshape(-1, logits.shape[-1]), batch_stats, gradients)


def _moved_average(hyper: Hyperparameters, average: Any, params: Any, step: Array) -> Any:
    """The moving average of the parameters after one more step.

    Its decay grows towards `ema_decay` as (1 + step) / (10 + step), as in TF's
    ExponentialMovingAverage, so that it soon forgets where training began.
    """
    decay = jnp.minimum(hyper.ema_decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(params, average, 1.0 - decay)


def train_step(
    spec: StepSpec,
    state: TrainState,
    hyper: Hyperparameters,
    x: Array,
    labels: Array,
    alive: Array | bool = True,
) -> tuple[TrainState, Array]:
    """One step on one batch.

    Args:
      spec: what is trained and how (static).
      state, hyper: where training stands, and the numbers that may be swept.
      x: [batch, time, features].
      labels: integers [batch].
      alive: whether this run has not diverged before.

    Returns:
      The new state, and whether the run is alive still: whether the loss, the gradient and what
      they lead to are finite. Where not, the state is the old one, step count included: a run
      that diverges stands still.
    """
    loss, logits, batch_stats, gradients = _gradients(spec, state, hyper, x, labels)
    if spec.data_axis is not None:
        loss, gradients = jax.lax.pmean((loss, gradients), spec.data_axis)
        logits, labels = jax.lax.all_gather((logits, labels), spec.data_axis, tiled=True)
    with jax.named_scope("optimizer"):
        updates, opt_state = spec.make_optimizer(hyper).update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    norms = clip_state(opt_state)
    gradient_norm = jnp.sqrt(jnp.sum(jnp.square(norms.raw)))
    sizes = jnp.stack([loss, gradient_norm, optax.tree.norm((params, batch_stats))])
    alive = jnp.isfinite(sizes).all() & alive
    metrics = TrainMetrics.single_from_model_output(
        loss=loss,
        logits=logits,
        labels=labels,
        gradient_norm=gradient_norm,
        is_clipped=jnp.any(norms.clipped < norms.raw).astype(jnp.float32),
    )
    row = state.step % state.gradient_norms.shape[0]
    new = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        metrics=state.metrics.merge(metrics),
        gradient_norms=state.gradient_norms.at[row].set(jnp.stack(norms)),
        ema_params=None if state.ema_params is None else _moved_average(hyper, state.ema_params, params, state.step),
    )
    return jax.tree.map(lambda n, o: jnp.where(alive, n, o), new, state), alive


def train_steps(
    spec: StepSpec,
    state: TrainState,
    hyper: Hyperparameters,
    images: Array,
    labels: Array,
    orders: Array,
    offset: Array,
    count: Array,
    alive: Array | bool = True,
) -> tuple[TrainState, Array]:
    """`count` steps as one loop on the device, the same for each of several runs under ``vmap``.

    Args:
      spec: what is trained and how (static).
      state, hyper: as in `train_step`.
      images, labels: the whole training set, uint8 [size, height, width] and [size].
      orders, offset: as `ExampleStream.window` gives them for ``state.step``.
      count: how many steps; traced, so one program serves all counts.
      alive: as in `train_step`.

    Returns:
      The state after `count` steps, or before the first step that was not finite; and whether
      the run is alive. A run that diverges takes the time of the others.
    """

    def one(done: Array, loop: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
        state, alive = loop
        size = spec.batch_size
        with jax.named_scope("input"):
            batch = _own(spec, jax.lax.dynamic_slice(orders, (offset + done * size,), (size,)))
            x, wanted = spec.view(images[batch]), labels[batch].astype(jnp.int32)
        return train_step(spec, state, hyper, x, wanted, alive)

    return jax.lax.fori_loop(0, count, one, (state, jnp.asarray(alive)))


def gradient_report(
    spec: StepSpec, state: TrainState, hyper: Hyperparameters, images: Array, labels: Array
) -> tuple[Array, dict[str, Array]]:
    """The loss of the next batch and the norm of each tensor's gradient before the clip, by its path."""
    x = spec.view(images)
    found = _gradients(spec, state, hyper, x, labels.astype(jnp.int32))
    norms = [jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(found.params)]
    return found.loss, dict(zip(tensor_names(found.params), norms, strict=True))
