"""From config to an optax chain: the clip, the update rule, the learning-rate schedule.

What may be swept (rates, decays, the clip's norm) are leaves of `Hyperparameters`,
passed to the pure step; no Python branch depends on their values.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from seqmnist_jax.errors import UsageError, choose
from seqmnist_jax.models.cells import build_cell
from seqmnist_jax.workdir.config import flatten

Array = jax.Array
Path = tuple[str, ...]
# The group of tensors whose joint norm clips the tensor at this path; None: not clipped.
GroupOf = Callable[[Path], Hashable | None]


class Hyperparameters(flax.struct.PyTreeNode):
    """The numbers of a training step that may be swept, as a pytree."""

    learning_rate: float | Array
    rmsprop_decay: float | Array
    adam_beta1: float | Array
    adam_beta2: float | Array
    weight_decay: float | Array
    recurrent_rate: float | Array
    clip_norm: float | Array
    input_keep: float | Array
    output_keep: float | Array
    state_keep: float | Array
    label_smoothing: float | Array
    ema_decay: float | Array
    noise: float | Array


DROPOUT_PLACES = ("input_keep", "output_keep", "state_keep")

_SHARE = ("at least 0 and less than 1 in float32", lambda value: 0.0 <= value < 1.0)
_SHARE_OR_OFF = ("0 (off) or more, and less than 1 in float32", lambda value: 0.0 <= value < 1.0)
_NOT_NEGATIVE = ("0 or more, finite in float32", lambda value: 0.0 <= value < math.inf)
_POSITIVE = (
    "more than 0, finite in float32. To clip nothing, set optimizer.clip.mask=none",
    lambda value: 0.0 < value < math.inf,
)
_KEEP = ("more than 0 and at most 1 (keep all)", lambda value: 0.0 < value <= 1.0)
# The config's field of each hyperparameter, what it may be, and whether a value is that.
SWEEPABLE: dict[str, tuple[str, str, Callable[[float], bool]]] = {
    "learning_rate": ("optimizer.learning_rate", *_NOT_NEGATIVE),
    "rmsprop_decay": ("optimizer.rmsprop_decay", *_SHARE),
    "adam_beta1": ("optimizer.adam_beta1", *_SHARE),
    "adam_beta2": ("optimizer.adam_beta2", *_SHARE),
    "weight_decay": ("optimizer.weight_decay", *_NOT_NEGATIVE),
    "recurrent_rate": ("optimizer.recurrent_rate", *_NOT_NEGATIVE),
    "clip_norm": ("optimizer.clip.norm", *_POSITIVE),
    "label_smoothing": ("train.label_smoothing", *_SHARE_OR_OFF),
    "ema_decay": ("optimizer.ema_decay", *_SHARE_OR_OFF),
    "noise": ("train.noise", *_NOT_NEGATIVE),
    **{place: (f"model.dropout.{place}", *_KEEP) for place in DROPOUT_PLACES},
}
MakeOptimizer = Callable[[Hyperparameters], optax.GradientTransformation]
UnitSchedule = Callable[[Array], Array]

CLIP_MASKS: dict[str, Callable[[Path], bool]] = {
    "recurrent": lambda path: "rnn" in path,
    "all_but_dense": lambda path: path[0] != "dense",
    "all": lambda path: True,
    "none": lambda path: False,
}


def _tensor_group(path: Path, joint_kernels: bool) -> Hashable:
    is_kernel = "rnn" in path and path[-1] in ("kernel", "recurrent_kernel")
    return (*path[:-1], "kernels") if joint_kernels and is_kernel else path


CLIP_UNITS: dict[str, Callable[[Path, bool], Hashable]] = {
    # Each tensor by its own norm, TF's clip_by_norm; TF's LSTM keeps both kernels in one.
    "tensor": _tensor_group,
    # All tensors of a layer jointly, both directions of a recurrent one, as if in cuDNN's one buffer.
    "layer": lambda path, joint_kernels: path[: path.index("rnn") + 2] if "rnn" in path else path[:-1],
    # Everything that the mask lets through, jointly.
    "group": lambda path, joint_kernels: "all",
}


class ClipState(NamedTuple):
    """What the clip did last.

    Attributes:
      raw, clipped: the norm of each tensor before and after, float32 [tensors], in the
        order of ``jax.tree.leaves``.
    """

    raw: Array
    clipped: Array


def clip_by_group_norm(max_norm: float | Array, group_of: GroupOf) -> optax.GradientTransformation:
    """Scales each group of tensors down to an L2 norm of at most `max_norm`.

    g * max_norm / max(norm, max_norm), as TF's ``clip_by_norm``, with the norm over all
    tensors of one group. Optax clips by each block or by everything, not by groups. The
    state records the norms, for those who watch the threshold.

    Args:
      max_norm: the largest norm that passes unchanged.
      group_of: maps a tensor's path to its group, or to None: left as it is.
    """

    def init(params: optax.Params) -> ClipState:
        blank = jnp.zeros(len(jax.tree.leaves(params)), jnp.float32)
        return ClipState(blank, blank)

    @jax.named_scope("clip")
    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipState]:
        del state, params
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        groups = [group_of(tuple(str(entry.key) for entry in path)) for path, _ in leaves]
        squares = [jnp.sum(jnp.square(leaf)) for _, leaf in leaves]
        sums: dict[Hashable, Array] = {}
        for group, square in zip(groups, squares, strict=True):
            sums[group] = sums.get(group, jnp.float32(0.0)) + square
        factors = {group: max_norm / jnp.maximum(jnp.sqrt(total), max_norm) for group, total in sums.items()}
        factors[None] = jnp.float32(1.0)
        scales = [factors[group] for group in groups]
        raw = jnp.sqrt(jnp.stack(squares))
        clipped = [leaf * scale for (_, leaf), scale in zip(leaves, scales, strict=True)]
        return jax.tree_util.tree_unflatten(structure, clipped), ClipState(raw, raw * jnp.stack(scales))

    return optax.GradientTransformation(init, update)


def is_recurrent(names: tuple[str, ...], path: Any) -> bool:
    """Whether the tensor at this path is one of a cell's `recurrent` ones, of these names."""
    keys = [entry.key for entry in path]
    return "rnn" in keys and keys[-1] in names


def clip_state(opt_state: optax.OptState) -> ClipState:
    """What the clip of a chain by `build_optimizer` recorded."""
    return opt_state[0]


def _warmup_cosine(config: ml_collections.ConfigDict) -> UnitSchedule:
    optimizer, steps = config.optimizer, config.train.steps
    if not 0 <= optimizer.warmup_steps < steps:
        raise UsageError(
            f"optimizer.warmup_steps is {optimizer.warmup_steps}; expected 0 to train.steps - 1 = {steps - 1}."
        )
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=steps,
        end_value=optimizer.final_fraction,
    )


def _drop(config: ml_collections.ConfigDict) -> UnitSchedule:
    optimizer = config.optimizer
    return optax.schedules.piecewise_constant_schedule(1.0, {optimizer.drop_steps: optimizer.final_fraction})


# By name: what makes the factor on the learning rate, a function of the step, and the fields of config.optimizer that
# it reads and some others do not.
SCHEDULES: dict[str, tuple[Callable[[ml_collections.ConfigDict], UnitSchedule], tuple[str, ...]]] = {
    "constant": (lambda config: optax.schedules.constant_schedule(1.0), ()),
    "warmup_cosine": (_warmup_cosine, ("warmup_steps", "final_fraction")),
    "drop": (_drop, ("drop_steps", "final_fraction")),
}


def build_schedule(config: ml_collections.ConfigDict) -> UnitSchedule:
    """The factor on the learning rate at each step.

    Raises:
      UsageError: an unknown name or an impossible value.
    """
    build, _ = choose(SCHEDULES, config.optimizer.schedule, "optimizer.schedule")
    return build(config)


def _rmsprop(config: ml_collections.ConfigDict) -> MakeOptimizer:
    # TF1's RMSProp: epsilon inside the root, and a mean square that starts at one.
    epsilon, initial = config.optimizer.rmsprop_epsilon, config.optimizer.rmsprop_initial_mean_square
    return lambda hyper: optax.scale_by_rms(
        decay=hyper.rmsprop_decay, eps=epsilon, initial_scale=initial, eps_in_sqrt=True
    )


def _adam(config: ml_collections.ConfigDict) -> MakeOptimizer:
    epsilon = config.optimizer.adam_epsilon
    return lambda hyper: optax.scale_by_adam(b1=hyper.adam_beta1, b2=hyper.adam_beta2, eps=epsilon)


def _adamw(config: ml_collections.ConfigDict) -> MakeOptimizer:
    # Decoupled decay (Loshchilov & Hutter 2019), of kernels only.
    adam, recurrent = _adam(config), build_cell(config).recurrent

    def decays(params: optax.Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim > 1 and not is_recurrent(recurrent, path), params
        )

    return lambda hyper: optax.chain(adam(hyper), optax.add_decayed_weights(hyper.weight_decay, mask=decays))


OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
# By name: what makes the update rule, a function of the hyperparameters, and such fields.
RULES: dict[str, tuple[Callable[[ml_collections.ConfigDict], MakeOptimizer], tuple[str, ...]]] = {
    "rmsprop": (_rmsprop, ("rmsprop_decay", "rmsprop_epsilon", "rmsprop_initial_mean_square")),
    "adam": (_adam, OF_ADAM),
    "adamw": (_adamw, (*OF_ADAM, "weight_decay")),
    "sgd": (lambda config: lambda hyper: optax.identity(), ()),
}

# The models of whose parameters a mask lets none through.
UNCLIPPED = {"recurrent": ("tcn", "mlp", "linear"), "all_but_dense": ("linear",)}


def build_unread(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The fields of config.optimizer that are not read, and by which field that is so."""
    optimizer = config.optimizer
    unread: dict[str, str] = {}
    tables: dict[str, Mapping[str, tuple[Any, tuple[str, ...]]]] = {"name": RULES, "schedule": SCHEDULES}
    for by, table in tables.items():
        others = {field for _, fields in table.values() for field in fields} - set(table[optimizer[by]][1])
        unread |= {f"optimizer.{field}": f"optimizer.{by}={optimizer[by]!r}" for field in sorted(others)}
    if optimizer.clip.mask == "none":
        unread |= dict.fromkeys(("optimizer.clip.norm", "optimizer.clip.unit"), "optimizer.clip.mask='none'")
    elif config.model.name in UNCLIPPED.get(optimizer.clip.mask, ()):
        why = f"model.name={config.model.name!r}, of which optimizer.clip.mask={optimizer.clip.mask!r} clips nothing"
        unread |= dict.fromkeys(("optimizer.clip.norm", "optimizer.clip.unit"), why)
    return unread


def as_float32(value: float) -> float:
    """The value as the device will see it; infinite where float32 has no such number."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def build_hyperparameters(config: ml_collections.ConfigDict) -> Hyperparameters:
    """The numbers of a config that may be swept.

    Raises:
      UsageError: one of them is impossible.
    """
    flat, values = flatten(config.to_dict()), {}
    for name, (field, expected, holds) in SWEEPABLE.items():
        value = values[name] = flat[field]
        if not holds(value) or not holds(as_float32(value)):
            raise UsageError(f"{field} is {value}; expected {expected}.")
    return Hyperparameters(**values)


def build_clip_groups(config: ml_collections.ConfigDict) -> GroupOf:
    """The group of tensors by whose joint norm config.optimizer.clip clips each tensor.

    Raises:
      UsageError: an unknown name.
    """
    is_masked = choose(CLIP_MASKS, config.optimizer.clip.mask, "optimizer.clip.mask")
    unit = choose(CLIP_UNITS, config.optimizer.clip.unit, "optimizer.clip.unit")
    joint_kernels = build_cell(config).joint_kernels
    return lambda path: unit(path, joint_kernels) if is_masked(path) else None


def build_optimizer(config: ml_collections.ConfigDict) -> MakeOptimizer:
    """The chain clip -> rule -> rate that config.optimizer names, as a function of its numbers.

    Raises:
      UsageError: an unknown name or an impossible value.
    """
    build_rule, _ = choose(RULES, config.optimizer.name, "optimizer.name")
    rule = build_rule(config)
    unit_rate = build_schedule(config)
    group_of = build_clip_groups(config)
    for name in ("rmsprop_epsilon", "adam_epsilon", "rmsprop_initial_mean_square"):
        if not 0.0 <= as_float32(config.optimizer[name]) < math.inf:
            raise UsageError(f"optimizer.{name} is {config.optimizer[name]}; expected 0 or more, finite in float32.")

    recurrent = functools.partial(is_recurrent, build_cell(config).recurrent)

    def make(hyper: Hyperparameters) -> optax.GradientTransformation:
        def scale(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> Any:
            del params
            rate = -hyper.learning_rate * unit_rate(state.count)
            own_rate = rate * hyper.recurrent_rate

            def scaled(path: Any, update: Array) -> Array:
                return jnp.asarray(own_rate if recurrent(path) else rate, update.dtype) * update

            counted = optax.ScaleByScheduleState(count=optax.safe_increment(state.count))
            return jax.tree_util.tree_map_with_path(scaled, updates), counted

        # Optax's `scale_by_schedule`, whose state checkpoints have, with two rates.
        scale_by_rates = optax.GradientTransformation(optax.scale_by_schedule(unit_rate).init, scale)
        return optax.chain(clip_by_group_norm(hyper.clip_norm, group_of), rule(hyper), scale_by_rates)

    return make
