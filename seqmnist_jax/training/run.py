"""A run, put together from its config: task, model, optimiser, and when what happens."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import clu.parameter_overview
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from seqmnist_jax import rnn
from seqmnist_jax.data.sources import find_data_dir
from seqmnist_jax.data.task import Task, build_task
from seqmnist_jax.data.views import SequenceView
from seqmnist_jax.devices import memory
from seqmnist_jax.devices.mesh import make_mesh
from seqmnist_jax.devices.profiling import parse_steps
from seqmnist_jax.errors import UsageError, check_name
from seqmnist_jax.models import reading
from seqmnist_jax.models.build import build_model
from seqmnist_jax.models.build import build_unread as build_unread_model
from seqmnist_jax.models.cells import build_own
from seqmnist_jax.models.reading import Variables
from seqmnist_jax.training.optimizers import (
    DROPOUT_PLACES,
    SWEEPABLE,
    Hyperparameters,
    UnitSchedule,
    build_hyperparameters,
    build_optimizer,
    build_schedule,
    build_unread,
)
from seqmnist_jax.training.state import INIT_STREAM, TrainMetrics, TrainState
from seqmnist_jax.training.step import StepSpec, gradient_report, train_steps
from seqmnist_jax.workdir import config as configs

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is trained, how, from which seed: the pure functions of a run, with their static parts bound.

    Attributes:
      spec: the static parts of a training step.
      hyper: its numbers.
      seed: all randomness follows from it.
      window: of how many steps gradient norms are remembered.
      averages: whether a moving average of the parameters is kept, and is what is measured.
      unit_rate: the factor on the learning rate, a function of the step.
      eval_precision: of the recurrence's products wherever the model is not trained.
    """

    spec: StepSpec
    hyper: Hyperparameters
    seed: int
    window: int
    averages: bool
    unit_rate: UnitSchedule
    eval_precision: str

    @property
    def model(self) -> nn.Module:
        """The model, as a Flax module."""
        return self.spec.model

    @property
    def view(self) -> SequenceView:
        """How images become sequences."""
        return self.spec.view

    @property
    def measured(self) -> nn.Module:
        """The model as it is evaluated and read, at a precision of its own."""
        return self.spec.model.at(self.eval_precision)

    def init(self) -> TrainState:
        """The state before the first step."""
        return self.init_from(self.seed, self.hyper)

    def init_from(self, seed: Array | int, hyper: Hyperparameters) -> TrainState:
        """The same from another seed and other numbers, which may be traced."""
        key = jax.random.key(seed)
        example = jnp.zeros((1, self.view.sequence_length, self.view.features))
        variables = self.model.init(jax.random.fold_in(key, INIT_STREAM), example)
        params = variables["params"]
        return TrainState(
            step=jnp.int32(0),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=self.spec.make_optimizer(hyper).init(params),
            key=key,
            metrics=TrainMetrics.empty(),
            gradient_norms=jnp.zeros((self.window, 2, len(jax.tree.leaves(params))), jnp.float32),
            # A copy, because the state's buffers are donated, each once.
            ema_params=jax.tree.map(jnp.copy, params) if self.averages else None,
        )

    @functools.cached_property
    def template(self) -> TrainState:
        """The shapes of a state, without making one."""
        return jax.eval_shape(self.init)

    def train_steps(self, data_axis: str | None = None) -> Callable[..., tuple[TrainState, Array]]:
        """The pure function ``(state, hyper, images, labels, orders, offset, count, alive) -> (state, alive)``.

        Args:
          data_axis: the axis of a ``shard_map``, in which alone it then runs, over which batches are divided.
        """
        spec = self.spec
        if data_axis is not None:
            spec = spec._replace(model=spec.model.clone(data_axis=data_axis), data_axis=data_axis)
        return functools.partial(train_steps, spec)

    def gradient_report(self) -> Callable[..., tuple[Array, dict[str, Array]]]:
        """The pure function ``(state, hyper, images, labels) -> (loss, gradient norms)``."""
        return functools.partial(gradient_report, self.spec)

    def predict_logits(self, batch_size: int) -> Callable[[Variables, Array], Array]:
        """The pure function ``(variables, images) -> logits``."""
        return functools.partial(reading.predict_logits, self.measured, self.view, batch_size)


def build_learner(config: ml_collections.ConfigDict, view: SequenceView, num_classes: int) -> Learner:
    """The learner that config.model, config.optimizer, config.train and config.seed describe.

    Raises:
      UsageError: an unknown name or an impossible value.
    """
    min_length = config.data.min_length
    if not 0 <= min_length <= view.sequence_length:
        raise UsageError(
            f"data.min_length is {min_length}; expected 0 (off) to {view.sequence_length}, the whole sequence."
        )
    eval_precision = config.runtime.eval_precision
    check_name(eval_precision, rnn.PRECISIONS, "runtime.eval_precision")
    parts, batch_size = config.train.accumulate, config.train.batch_size
    if parts < 1 or batch_size % parts:
        raise UsageError(f"train.accumulate is {parts}; expected a divisor of train.batch_size = {batch_size}.")
    spec = StepSpec(
        model=build_model(config, view.sequence_length, num_classes),
        make_optimizer=build_optimizer(config),
        view=view,
        batch_size=batch_size,
        drops=frozenset(place for place in DROPOUT_PLACES if config.model.dropout[place] < 1.0),
        min_length=min_length or None,
        accumulate=parts,
        smooths=config.train.label_smoothing > 0.0,
        noisy=config.train.noise > 0.0,
    )
    hyper = jax.tree.map(jnp.float32, build_hyperparameters(config))
    return Learner(
        spec,
        hyper,
        seed=config.seed,
        window=config.train.eval_every,
        averages=config.optimizer.ema_decay > 0.0,
        unit_rate=build_schedule(config),
        eval_precision=eval_precision,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """The plan of a run, which never changes: a learner, its task, and its times. What changes is a `TrainState`.

    Attributes:
      config: as given, for the record.
      identity: what makes it this run and no other, as `config.identity`.
      batch_size, steps, eval_every, checkpoint_every: as in the config; in steps.
      checkpoint_seconds: as in the config.
      eval_batch_size, dispatch_seconds, mesh: as in the config.
      profile_steps: the steps to trace, as `profiling.parse_steps`.
      remark: what differs from the config as it was given, for the user; '' where nothing does.
      tests: whether the test images are read at its end; not of a trial, which is to be chosen by validation.
      choice: of which candidates its hyperparameters were chosen, and how good each was, for the record.
    """

    config: dict[str, Any]
    identity: configs.FlatConfig
    task: Task
    learner: Learner
    batch_size: int
    steps: int
    eval_every: int
    checkpoint_every: int
    checkpoint_seconds: float
    eval_batch_size: int
    dispatch_seconds: float
    mesh: str
    profile_steps: range
    remark: str = ""
    tests: bool = True
    choice: dict[str, Any] | None = None

    def recurrence(self) -> str:
        """What runs the model's recurrence in training, at which precision, and why."""
        learner = self.learner
        x = jax.ShapeDtypeStruct((self.batch_size, learner.view.sequence_length, learner.view.features), jnp.float32)
        drops_state = "state_keep" in learner.spec.drops
        what = learner.model.explain_engine(learner.template.params, x, drops_state=drops_state)
        return f"{what}; products in {learner.model.precision}, evaluation in {learner.eval_precision}"

    def overview(self) -> str:
        """The parameters, a line each, and how many there are."""
        params = self.learner.template.params
        lines = clu.parameter_overview.get_parameter_overview(params, include_stats=False).splitlines()
        count = clu.parameter_overview.count_parameters(params)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        return "\n".join([*lines[:-1], f"{count:,} parameters ({size / 2**10:,.1f} KiB)"])

    def mesh_for(self, replicas: int) -> Mesh | None:
        """The devices that so many replicas of it train on; errors as of `make_mesh`."""
        return make_mesh(self.mesh, replicas, self.batch_size // self.learner.spec.accumulate)

    def is_measured(self, step: int) -> bool:
        """Whether the model after this step is measured, so that it may be the selected one."""
        return configs.is_measured(step, self.eval_every, self.steps)

    def stays_measured(self, step: int) -> bool:
        """Whether a longer run is measured after this step too, which may be the end of this one."""
        return step % self.eval_every == 0

    @property
    def program(self) -> str:
        """What the compiled program depends on: runs of which it is the same can be its replicas."""
        traced = dict.fromkeys(("seed", *(field for field, _, _ in SWEEPABLE.values())))
        spec = self.learner.spec
        switches = [sorted(spec.drops), self.learner.averages, spec.smooths, spec.noisy]
        return json.dumps([{**self.identity, **traced}, self.config["runtime"], self.steps, switches], sort_keys=True)


def build_run(config: ml_collections.ConfigDict, task: Task | None = None, named: Iterable[str] = ()) -> Run:
    """Everything a config asks for, checked before anything is written.

    Args:
      config: of one run.
      task: the task that config.data asks for, where it is at hand already.
      named: the fields that a user set by name, rather than by a config file.

    Raises:
      UsageError: an unknown name or an impossible value in the config, or a field that would change nothing; or JAX
        has 64-bit numbers on.
      DataError: the data can't be read.
    """
    configs.check(config)
    if jnp.result_type(float) != jnp.float32:
        raise UsageError(
            "JAX_ENABLE_X64 is on; expected it off, since training is in float32 (only `seqmnist_jax.rnn` takes more)."
        )
    config, remark = _fitted(config, named)
    task = task or build_task(config)
    stored = configs.to_json(config)
    # The folder in force, whoever named it, so that evaluation finds the data again.
    stored["runtime"]["data_dir"] = str(find_data_dir(config.runtime.data_dir) or "")
    own_cell = build_own(config)
    if own_cell is not None:  # so that it is found again, and known by its content
        stored["runtime"]["cell_file"], stored["model"]["cell_hash"] = str(own_cell.file), own_cell.content_hash
    learner = build_learner(config, task.view, task.dataset.num_classes)
    configs.check_read(configs.flatten(config.to_dict()), build_unread_model(config) | build_unread(config), named)
    memory.check_state(learner.template)
    return Run(
        config=stored,
        identity=configs.identity(configs.from_json(stored), task.dataset.content_hash),
        task=task,
        learner=learner,
        batch_size=config.train.batch_size,
        steps=config.train.steps,
        eval_every=config.train.eval_every,
        checkpoint_every=config.runtime.checkpoint_every or config.train.eval_every,
        checkpoint_seconds=config.runtime.checkpoint_seconds,
        eval_batch_size=config.runtime.eval_batch_size,
        dispatch_seconds=config.runtime.dispatch_seconds,
        mesh=config.runtime.mesh,
        profile_steps=parse_steps(config.runtime.profile_steps, config.train.steps),
        remark=remark,
    )


def _fitted(config: ml_collections.ConfigDict, named: Iterable[str]) -> tuple[ml_collections.ConfigDict, str]:
    """The config with a warm-up that a short trial has room for, and what is to be said of it.

    One that the run has room for, or that a user has named, stays as it is.
    """
    optimizer, steps = config.optimizer, config.train.steps
    field = "optimizer.warmup_steps"
    if optimizer.schedule != "warmup_cosine" or optimizer.warmup_steps < steps or field in named:
        return config, ""
    fitted = config.copy_and_resolve_references()
    fitted.optimizer.warmup_steps = steps // 10
    return fitted, f"{field} is {steps // 10}, a tenth of the steps; {optimizer.warmup_steps} would not fit."
