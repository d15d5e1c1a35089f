"""The compiled programs of one run or of several replicas, and their data on the device."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seqmnist_jax.data import cache
from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.devices import memory
from seqmnist_jax.devices.mesh import DATA, REPLICA
from seqmnist_jax.devices.trees import here, move_to, stack, unstack
from seqmnist_jax.models.reading import Variables
from seqmnist_jax.training.clock import Clock
from seqmnist_jax.training.run import Run
from seqmnist_jax.training.state import TrainState, as_numbers, data_key, eval_metrics

Scores = dict[str, float]
# The folder of compiled programs that means none.
NO_CACHE = "none"
# What the training steps are called with, for those who draw them; and the axis of replicas of each, None
# where they share it.
ARGUMENTS = {
    "state": 0,
    "hyperparameters": 0,
    "data/images": None,
    "data/labels": None,
    "data/order": 0,
    "data/offset": None,
    "data/count": None,
    "state/alive": 0,
}


def keep_programs(directory: str) -> None:
    """Keeps compiled programs in a folder, so that the second start of a run need not compile.

    Args:
      directory: the folder; '' for what JAX_COMPILATION_CACHE_DIR names, else the package's own
        cache folder; 'none' to compile at each start.
    """
    if directory == NO_CACHE:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if directory or not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        place = Path(directory).expanduser() if directory else cache.folder() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(place))
    # JAX's own threshold of one second would leave out most of what a small network compiles.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Divergence(NamedTuple):
    """A step that led out of the finite numbers.

    Attributes:
      step: its number, from 1; the state before is finite.
      loss: of its batch.
      gradient_norms: of each tensor, before the clip.
      learning_rate: with its schedule.
      examples: the rows of the training split that made its batch.
    """

    step: int
    loss: float
    gradient_norms: dict[str, float]
    learning_rate: float
    examples: list[int]

    def facts(self) -> dict[str, Any]:
        """As JSON values; a number that is not finite as a text, because JSON has none."""

        def as_json(value: float) -> float | str:
            return value if math.isfinite(value) else str(value)

        norms = {name: as_json(norm) for name, norm in self.gradient_norms.items()}
        return {**self._asdict(), "loss": as_json(self.loss), "gradient_norms": norms}

    def reason(self) -> str:
        """In words: the loss and the largest gradient."""
        ranked = {name: math.inf if math.isnan(norm) else norm for name, norm in self.gradient_norms.items()}
        name = max(ranked, key=lambda n: ranked[n])
        text = f"the loss is {self.loss:.4g} and the largest gradient norm {self.gradient_norms[name]:.4g}, of {name}"
        return f"{text}, but the step from there leads out of the finite numbers" if self.is_finite() else text

    def is_finite(self) -> bool:
        """Whether the loss and all gradients are finite, so that the update itself is what led out."""
        return all(map(math.isfinite, (self.loss, *self.gradient_norms.values())))


class Programs:
    """The compiled programs of replicas, runs of one program that differ in seed and hyperparameters alone.

    One replica is compiled as it is; several as the ``vmap`` of the same functions, their states
    joined. On several devices both run in a ``shard_map`` over the mesh: each device has its share
    of the replicas, and of each batch, and all images.

    Attributes:
      traced: the training steps, as ``jax.jit(train_steps).trace`` gives them.
      memory_plan: what the training step needs and what there is, in one line.
    """

    def __init__(self, runs: Sequence[Run], states: TrainState, clock: Clock):
        """Puts the data in place and compiles the training step.

        Args:
          runs: the replicas.
          states: as `stack` makes them.
          clock: takes the time of all that is done here.

        Raises:
          TooLarge: the training step needs more memory than there is.
        """
        self._runs = runs
        self._clock = clock
        self._parts: dict[str, tuple[jax.Array, jax.Array]] = {}
        self._predict: dict[tuple[int, ...], Callable[..., jax.Array]] = {}
        run = runs[0]
        self._mesh = run.mesh_for(len(runs))
        self._hyper = self.place(stack([run.learner.hyper for run in runs]), each=True)
        images, labels = self._part("train")
        keys = [data_key(state) for state in unstack(states, len(runs))]
        self._streams = [ExampleStream(key, len(labels), run.batch_size) for key in keys]
        # The first stream's orders, and all of them joined, which is made once an epoch.
        self._joined: tuple[jax.Array, jax.Array] | None = None
        axis = DATA if self._mesh is not None else None
        each = self._each(run.learner.train_steps(axis), tuple(ARGUMENTS.values()), (0, 0))
        train = jax.jit(each, donate_argnums=0)
        orders, offset, _ = self._window(0)
        bounds = self._bounds(offset, 0, np.ones(len(runs), bool))
        arguments = (self.place(states), self._hyper, images, labels, orders, *bounds)
        self.traced = clock.measure("compile", lambda: train.trace(*arguments))
        self._train = clock.measure("compile", lambda: self.traced.lower().compile())
        self.memory_plan = memory.plan(self._train)

    def _each(
        self, function: Callable[..., Any], axes: tuple[int | None, ...], out: int | tuple[int, ...], data: int = -1
    ) -> Callable[..., Any]:
        """The function for all replicas, on all devices.

        Args:
          function: of one replica on one device.
          axes: 0 for arguments that each replica has, None for what they share, as in ``vmap``.
          out: the same of the results.
          data: the place of an argument, and of the results then, whose next axis is divided among devices.
        """
        several = len(self._runs) > 1
        if several:
            function = jax.vmap(function, in_axes=axes)
        if self._mesh is None:
            return function
        of_each = PartitionSpec(REPLICA) if several else PartitionSpec()
        wanted = [PartitionSpec() if axis is None else of_each for axis in axes]
        results = jax.tree.map(lambda _: of_each, out)
        if data >= 0:
            wanted[data] = PartitionSpec(DATA)
            results = PartitionSpec(REPLICA, DATA) if several else PartitionSpec(DATA)
        # What varies over which axis is not declared by the kernel's calls, so it can't be checked.
        return jax.shard_map(function, mesh=self._mesh, in_specs=tuple(wanted), out_specs=results, check_vma=False)

    def place(self, tree: Any, each: bool = True) -> Any:
        """The tree on the mesh, each device with its replicas as `stack` made them, or with all of it."""
        if self._mesh is None:
            return tree
        spec = PartitionSpec(REPLICA) if each and len(self._runs) > 1 else PartitionSpec()
        sharding = NamedSharding(self._mesh, spec)
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)

        def put(leaf: Any) -> jax.Array:
            if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
                return leaf  # on the mesh already
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
            return jax.device_put(np.asarray(leaf), sharding)

        return move_to(sharding)(jax.tree.map(put, tree))

    def _bounds(self, offset: int, count: int, active: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The numbers of a dispatch, moved to the device explicitly."""
        flags = active if len(self._runs) > 1 else active[0]
        if self._mesh is None:
            return jax.device_put((np.int32(offset), np.int32(count), flags))
        return (*self.place((np.int32(offset), np.int32(count)), each=False), self.place(flags))

    def _part(self, split: str) -> tuple[jax.Array, jax.Array]:
        """Images and labels of a split, put on the device at first use."""
        if split not in self._parts:
            part = self._runs[0].task.part(split)
            arrays = (jnp.asarray(part.images), jnp.asarray(part.labels))
            self._parts[split] = self.place(arrays, each=False)
        return self._parts[split]

    def _window(self, step: int) -> tuple[jax.Array, int, int]:
        windows = [stream.window(step) for stream in self._streams]
        _, offset, most = windows[0]
        if self._joined is None or self._joined[0] is not windows[0][0]:
            orders = self.place(stack([orders for orders, _, _ in windows]), each=True)
            self._joined = windows[0][0], orders
        return self._joined[1], offset, most

    def train(
        self, states: TrainState, step: int, count: int, active: np.ndarray
    ) -> tuple[TrainState, int, np.ndarray]:
        """Up to `count` steps from `step`.

        Args:
          states: where the replicas stand; their buffers are gone after the call.
          step: the steps done by those that are active.
          count: how many more.
          active: which replicas have not diverged, bool [replicas].

        Returns:
          The new states, the step of those that are active, and which are.
        """
        orders, offset, most = self._window(step)
        count = min(count, most)
        arguments = (self._hyper, *self._part("train"), orders, *self._bounds(offset, count, active))
        states, still = self._clock.measure("train", lambda: self._train(states, *arguments))
        return states, step + count, np.atleast_1d(jax.device_get(here(still)))

    def evaluate(self, variables: Variables, split: str) -> list[tuple[Scores, np.ndarray]]:
        """Loss and accuracy of each replica's model on a split, and its logits [count, classes]."""
        images, _ = self._part(split)
        labels = jnp.asarray(self._runs[0].task.part(split).labels)
        shards = 1 if self._mesh is None else self._mesh.shape[DATA]
        count, padding = len(images), -len(images) % shards
        if images.shape not in self._predict:
            run = self._runs[0]
            each = self._each(run.learner.predict_logits(run.eval_batch_size), (0, None), 0, data=1)

            def predict(variables: Variables, images: jax.Array) -> jax.Array:
                logits = each(variables, jnp.pad(images, ((0, padding), (0, 0), (0, 0))))
                return logits[..., :count, :]

            everywhere = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
            whole = jax.jit(predict, out_shardings=everywhere)
            self._predict[images.shape] = self._clock.measure(
                "compile", lambda: whole.lower(variables, images).compile()
            )

        def score() -> list[tuple[Scores, np.ndarray]]:
            found = unstack(self._predict[images.shape](variables, images), len(self._runs))
            return [(as_numbers(eval_metrics(logits, labels)), np.asarray(logits)) for logits in found]

        return self._clock.measure("evaluate", score)

    def divergence(self, replica: int, state: TrainState) -> Divergence:
        """What went wrong at a replica's step after its state."""
        run = self._runs[replica]
        orders, offset, _ = self._streams[replica].window(int(state.step))
        examples = np.asarray(orders[offset : offset + run.batch_size])
        batch = run.task.part("train")[examples]
        report = jax.jit(run.learner.gradient_report())
        loss, norms = report(state, run.learner.hyper, batch.images, batch.labels)
        return Divergence(
            step=int(state.step) + 1,
            loss=float(loss),
            gradient_norms={name: float(norm) for name, norm in norms.items()},
            learning_rate=float(run.learner.hyper.learning_rate * run.learner.unit_rate(state.step)),
            examples=examples.tolist(),
        )
