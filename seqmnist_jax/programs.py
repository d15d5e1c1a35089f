"""The compiled programs of one run or of several replicas, and their data on the device."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax import steps
from seqmnist_jax.clock import Clock
from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.run import Run

Scores = dict[str, float]


def join(trees: Sequence[Any]) -> Any:
    """The trees as one, each leaf with a leading axis of replicas; a single tree as it is."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def divide(tree: Any, count: int) -> list[Any]:
    """The trees that `join` made one."""
    return [tree] if count == 1 else [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


class Programs:
    """The compiled programs of replicas, runs of one program that differ in seed and hyperparameters alone.

    One replica is compiled as it is; several as the ``vmap`` of the same functions, their states
    joined. The images are shared.
    """

    def __init__(self, runs: Sequence[Run], states: steps.TrainState, clock: Clock):
        """Compiles the training step.

        Args:
          runs: the replicas.
          states: as `join` makes them.
          clock: takes the time of all that is done here.
        """
        self._runs = runs
        self._clock = clock
        self._parts: dict[str, tuple[jax.Array, jax.Array]] = {}
        self._predict: dict[tuple[int, ...], Callable[..., jax.Array]] = {}
        self._hyper = join([run.learner.hyper for run in runs])
        images, labels = self._part("train")
        keys = [steps.data_key(state) for state in divide(states, len(runs))]
        self._streams = [ExampleStream(key, len(labels), runs[0].batch_size) for key in keys]
        train = jax.jit(
            self._each(runs[0].learner.train_steps(), (0, 0, None, None, 0, None, None, 0)), donate_argnums=0
        )
        orders, offset, _ = self._window(0)
        arguments = (states, self._hyper, images, labels, orders, *map(np.int32, (offset, 0)))
        arguments += (self._flags(np.ones(len(runs), bool)),)
        self._train = clock.measure("compile", lambda: train.lower(*arguments).compile())

    def _each(self, function: Callable[..., Any], axes: tuple[int | None, ...]) -> Callable[..., Any]:
        return function if len(self._runs) == 1 else jax.vmap(function, in_axes=axes)

    def _flags(self, alive: np.ndarray) -> Any:
        """One flag for each replica, as the program takes them."""
        return alive if len(self._runs) > 1 else alive[0]

    def _part(self, split: str) -> tuple[jax.Array, jax.Array]:
        """Images and labels of a split, put on the device at first use."""
        if split not in self._parts:
            part = self._runs[0].task.part(split)
            self._parts[split] = (jnp.asarray(part.images), jnp.asarray(part.labels))
        return self._parts[split]

    def _window(self, step: int) -> tuple[jax.Array, int, int]:
        windows = [stream.window(step) for stream in self._streams]
        _, offset, most = windows[0]
        if self._joined is None or self._joined[0] is not windows[0][0]:
            self._joined = windows[0][0], join([orders for orders, _, _ in windows])
        return self._joined[1], offset, most

    # The first stream's orders, and all of them joined, which is made once an epoch.
    _joined: tuple[jax.Array, jax.Array] | None = None

    def train(
        self, states: steps.TrainState, step: int, count: int, alive: np.ndarray
    ) -> tuple[steps.TrainState, int, np.ndarray]:
        """Up to `count` steps from `step`.

        Args:
          states: where the replicas stand; their buffers are gone after the call.
          step: the steps done by those that are alive.
          count: how many more.
          alive: which replicas have not diverged, bool [replicas].

        Returns:
          The new states, the step of those alive, and which are.
        """
        orders, offset, most = self._window(step)
        count = min(count, most)
        bounds = jax.device_put((np.int32(offset), np.int32(count), self._flags(alive)))
        arguments = (self._hyper, *self._part("train"), orders, *bounds)
        states, still = self._clock.measure("train", lambda: self._train(states, *arguments))
        return states, step + count, np.atleast_1d(jax.device_get(still))

    def evaluate(self, variables: steps.Variables, split: str) -> list[tuple[Scores, np.ndarray]]:
        """Loss and accuracy of each replica's model on a split, and its logits [count, classes]."""
        images, labels = self._part(split)
        if images.shape not in self._predict:
            run = self._runs[0]
            predict = jax.jit(self._each(run.learner.predict_logits(run.eval_batch_size), (0, None)))
            self._predict[images.shape] = self._clock.measure(
                "compile", lambda: predict.lower(variables, images).compile()
            )

        def score() -> list[tuple[Scores, np.ndarray]]:
            found = divide(self._predict[images.shape](variables, images), len(self._runs))
            return [(steps.as_numbers(steps.eval_metrics(logits, labels)), np.asarray(logits)) for logits in found]

        return self._clock.measure("evaluate", score)

    def divergence(self, replica: int, state: steps.TrainState) -> str:
        """What went wrong at a replica's step after its state: its loss and its largest gradient, by tensor."""
        run = self._runs[replica]
        orders, offset, _ = self._streams[replica].window(int(state.step))
        batch = orders[offset : offset + run.batch_size]
        images, labels = self._part("train")
        loss, gradients = jax.jit(run.learner.gradient_report())(state, run.learner.hyper, images[batch], labels[batch])
        largest = {name: math.inf if math.isnan(value) else float(value) for name, value in gradients.items()}
        name = max(largest, key=lambda n: largest[n])
        report = f"the loss is {float(loss):.4g} and the largest gradient {float(gradients[name]):.4g}, of {name}"
        finite = math.isfinite(loss) and math.isfinite(largest[name])
        return f"{report}, but the step from there leads out of the finite numbers" if finite else report
