"""The compiled programs of a run, and its data on the device."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax import steps
from seqmnist_jax.clock import Clock
from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.run import Run


class Programs:
    """The compiled programs of a run, and its data on the device."""

    def __init__(self, run: Run, state: steps.TrainState, clock: Clock):
        self._run = run
        self._clock = clock
        self._parts: dict[str, tuple[jax.Array, jax.Array]] = {}
        self._predict: dict[tuple[int, ...], Callable[..., jax.Array]] = {}
        images, labels = self._part("train")
        self._stream = ExampleStream(steps.data_key(state), len(labels), run.batch_size)
        orders, _, _ = self._stream.window(0)
        train = jax.jit(run.learner.train_steps(), donate_argnums=0)
        bound = jnp.int32(0)
        self._train = clock.measure(
            "compile",
            lambda: train.lower(state, run.learner.hyper, images, labels, orders, bound, bound).compile(),
        )

    def _part(self, split: str) -> tuple[jax.Array, jax.Array]:
        """Images and labels of a split, put on the device at first use."""
        if split not in self._parts:
            part = self._run.task.part(split)
            self._parts[split] = (jnp.asarray(part.images), jnp.asarray(part.labels))
        return self._parts[split]

    def train(self, state: steps.TrainState, step: int, count: int) -> tuple[steps.TrainState, int, bool]:
        """Up to `count` steps from `step`.

        Returns:
          The new state (the old one's buffers are gone), its step, and whether all was finite.
        """
        orders, offset, most = self._stream.window(step)
        bounds = jax.device_put((np.int32(offset), np.int32(min(count, most))))
        arguments = (self._run.learner.hyper, *self._part("train"), orders, *bounds)
        state, finite = self._clock.measure("train", lambda: self._train(state, *arguments))
        step, finite = jax.device_get((state.step, finite))
        return state, int(step), bool(finite)

    def evaluate(self, variables: steps.Variables, split: str) -> tuple[dict[str, float], np.ndarray]:
        """Loss and accuracy of a model on a split, and its logits [count, classes]."""
        images, labels = self._part(split)
        if images.shape not in self._predict:
            predict = jax.jit(self._run.learner.predict_logits(self._run.eval_batch_size))
            self._predict[images.shape] = self._clock.measure(
                "compile", lambda: predict.lower(variables, images).compile()
            )

        def score() -> tuple[dict[str, float], np.ndarray]:
            logits = self._predict[images.shape](variables, images)
            return steps.as_numbers(steps.eval_metrics(logits, labels)), np.asarray(logits)

        return self._clock.measure("evaluate", score)

    def divergence(self, state: steps.TrainState, step: int) -> str:
        """What went wrong at the step after `step`: its loss and its largest gradient, by tensor."""
        orders, offset, _ = self._stream.window(step)
        batch = orders[offset : offset + self._run.batch_size]
        images, labels = self._part("train")
        loss, gradients = jax.jit(self._run.learner.gradient_report())(
            state, self._run.learner.hyper, images[batch], labels[batch]
        )
        largest = {name: math.inf if math.isnan(value) else float(value) for name, value in gradients.items()}
        name = max(largest, key=lambda n: largest[n])
        report = f"the loss is {float(loss):.4g} and the largest gradient {float(gradients[name]):.4g}, of {name}"
        finite = math.isfinite(loss) and math.isfinite(largest[name])
        return f"{report}, but the step from there leads out of the finite numbers" if finite else report
