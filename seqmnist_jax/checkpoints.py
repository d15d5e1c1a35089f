"""Checkpoints of a run, through orbax: save, restore, which is last, which is best."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from seqmnist_jax.errors import SeqMnistError
from seqmnist_jax.steps import TrainState, Variables

Json = Any
Rank = tuple[float, float, int]


class CheckpointError(SeqMnistError):
    """A checkpoint is missing, can't be read or is of another model."""


def _rank(metrics: Json) -> Rank:
    """Orders checkpoints from worst to best: accuracy, then lower loss, then earlier."""
    return metrics["accuracy"], -metrics["loss"], -metrics["step"]


class Checkpoints:
    """The checkpoints under one folder: the last two and the best by validation.

    A save is atomic: a folder appears under its final name when all of it is written. Of several
    processes the first alone saves; each reads for itself.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        folder = self._folder = folder.absolute()  # orbax takes no relative path
        process = jax.process_index()
        self._saves = not read_only and process == 0
        read_only = not self._saves
        if self._saves:
            folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            folder,
            item_names=("model", "training", "metadata"),
            options=ocp.CheckpointManagerOptions(
                create=False,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=False,
                # A process by itself, as far as orbax is concerned: the state is whole in each.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process_{process}"
                )
                if jax.process_count() > 1
                else ocp.options.MultiprocessingOptions(),
                best_fn=_rank,  # without one, orbax stores no metrics for the policy below
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [
                        preservation_policy.LatestN(2),
                        preservation_policy.BestN(
                            get_metric_fn=_rank,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
            ),
        )

    def save(self, state: TrainState, metadata: Json, validation: dict[str, float] | None) -> None:
        """Saves a state under its step number; `validation` is its accuracy and loss where it was evaluated."""
        if not self._saves:
            return
        step = int(state.step)
        model, training = _divide(state)
        if jax.process_count() > 1:
            # Orbax takes no array that only this process has, unless it is NumPy's.
            model, training = jax.tree.map(np.asarray, (model, training))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                training=ocp.args.StandardSave(training),
                metadata=ocp.args.JsonSave(metadata),
            ),
            metrics=None if validation is None else {**validation, "step": step},
            force=True,
        )
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps of all checkpoints."""
        return list(self._manager.all_steps())

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        for later in self.steps() if self._saves else ():
            if later > step:
                self._manager.delete(later)

    def refresh(self) -> None:
        """Looks again at what is in the folder, where another process saves."""
        if not self._saves:
            self._manager.reload()

    def last_step(self) -> int | None:
        """The newest checkpoint's step; None where there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the best checkpoint that was evaluated; None where none was."""
        ranks = [_rank(metrics) for step in self._manager.all_steps() if (metrics := self._manager.metrics(step))]
        return -max(ranks)[2] if ranks else None

    def validation(self, step: int) -> dict[str, float] | None:
        """Accuracy and loss on the validation set at a checkpoint; None where it was not evaluated."""
        return self._manager.metrics(step)

    def metadata(self, step: int) -> Json:
        """The JSON values saved beside the checkpoint of a step.

        Raises:
          CheckpointError: they can't be read.
        """
        return self._restore(step, metadata=ocp.args.JsonRestore())["metadata"]

    def restore(self, step: int, template: TrainState) -> TrainState:
        """The training state at a step, on this process's first device.

        Args:
          step: that of a checkpoint.
          template: a state with the right tree, shapes and dtypes (of arrays or shapes).

        Raises:
          CheckpointError: it can't be read, or its tree is not the template's.
        """
        model, training = (ocp.args.StandardRestore(_on_one_device(part)) for part in jax.eval_shape(_divide, template))
        restored = self._restore(step, model=model, training=training)
        return template.replace(
            **restored["model"],
            **{**restored["training"], "key": jax.random.wrap_key_data(restored["training"]["key"])},
        )

    def restore_variables(self, step: int, template: TrainState) -> Variables:
        """Only what the model needs of the state at a step; arguments and errors as in `restore`."""
        model, _ = jax.eval_shape(_divide, template)
        restored = self._restore(step, model=ocp.args.StandardRestore(_on_one_device(model)))
        return template.replace(**restored["model"]).variables

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # orbax and tensorstore raise many kinds
            reason = str(e).strip().splitlines()[0][:300] if str(e).strip() else type(e).__name__
            raise CheckpointError(
                f"The checkpoint {self._folder / str(step)} can't be restored into this model ({reason}). "
                "It is damaged, or its work directory's config.json is not the one it was trained with."
            ) from e

    def close(self) -> None:
        """Waits for what is under way and releases the folder."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _divide(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model needs, and what only training needs; apart, so that either may change its form alone."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    fields["key"] = jax.random.key_data(state.key)  # as plain numbers
    model = {name: fields.pop(name) for name in ("params", "batch_stats", "ema_params")}
    return model, fields


def _on_one_device(tree: Any) -> Any:
    """Shapes that restore to this process's first device, whatever device saved them."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
