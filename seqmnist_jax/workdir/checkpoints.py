"""Checkpoints of a run, through orbax: saved beside training, checked by checksums, the last and the best kept."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from seqmnist_jax.devices.trees import on_one_device, tensor_names
from seqmnist_jax.errors import SeqMnistError

T = TypeVar("T")
Json = Any
Rank = tuple[float, float, int]
Tree = dict[str, Any]
# What a checkpoint consists of beside its metadata, by name: what the model needs, and what only training needs.
Parts = dict[str, Tree]
PARTS = ("model", "training")

DAMAGED, DELETED = "damaged", "deleted"
# What keeps a whole file from being read for a while, as the system, Python and XLA tell it.
_PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
PASSING = (*map(os.strerror, _PASSING), "MemoryError", "bad_alloc", "Unable to allocate", "RESOURCE_EXHAUSTED")
# About what a checkpoint takes on a disk besides its arrays: some thirty small files.
OVERHEAD_BYTES = 200_000


class CheckpointError(SeqMnistError):
    """A checkpoint is missing, damaged, or of another model."""


class OutOfReach(CheckpointError):
    """A checkpoint can't be read at the moment, which says nothing of what is in it."""


def rank(metrics: Json) -> Rank:
    """Orders checkpoints from worst to best: accuracy, then lower loss, then earlier."""
    return metrics["accuracy"], -metrics["loss"], -metrics["step"]


def _is_news(record: logging.LogRecord) -> bool:
    """All that orbax says but one thing, which is only what it was asked for."""
    return not record.getMessage().startswith("Given directory is read only")


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, rising, by their names alone."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def read_saved(folder: Path, read: Callable[["Checkpoints"], T]) -> T:
    """What `read` makes of the checkpoints in a folder where another process may save, and delete, at any time.

    Args:
      folder: theirs.
      read: reads them; called again where what it reads was deleted meanwhile.

    Raises:
      CheckpointError: one that is there can't be read.
    """
    while True:
        there = saved_steps(folder)
        try:
            with Checkpoints(folder, read_only=True) as checkpoints:
                return read(checkpoints)
        except (CheckpointError, OSError):
            if saved_steps(folder) == there:
                raise


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no one truth
class _Item:
    """What one checkpoint consists of, in this process's memory."""

    step: int
    parts: Parts
    metadata: Json
    metrics: Json | None


class Checkpoints:
    """The checkpoints under one folder: the last two and the best by validation.

    A save is atomic: a folder appears under its final name when all of it is written. It happens in
    a thread, beside training. What can't be saved, because the disk is full, is kept in memory
    and tried again with the next one. Of several processes the first alone saves; each reads for itself.

    A checkpoint holds checksums (SHA-256) of its arrays and of its metadata, which are checked
    whenever it is read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        read_only: bool = False,
        lasts: Callable[[int], bool] = lambda step: True,
    ):
        """Opens a folder.

        Args:
          folder: theirs.
          read_only: whether nothing may be changed in it.
          lasts: after which steps a longer run is measured too. The best of them alone is kept: the end of this run is
            one of the last two anyway, and a longer run would have only that.
        """
        self._lasts = lasts
        folder = self._folder = folder.absolute()  # orbax takes no relative path
        process = jax.process_index()
        self._saves = not read_only and process == 0
        self._aside: dict[int, str] = {}
        if self._saves:
            folder.mkdir(parents=True, exist_ok=True)
            self._take_back()
            self._delete()
            self._clear_half_saved()
        self._check_metrics()
        self._manager = self._open()
        # Orbax's own asynchronous saves report a full disk from their threads and leave its debris.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._saving: Future[str | None] | None = None
        self._unsaved: list[_Item] = []

    def _check_metrics(self) -> None:
        """Looks for orbax's files of metrics that can't be read, without which no manager can be made.

        Raises:
          CheckpointError: there is one, and this process may not set it aside.
        """
        for path in sorted(self._folder.glob("*/metrics/metrics")):
            if not path.parts[-3].isdigit():  # half a save, maybe another process's
                continue
            try:
                rank(json.loads(path.read_text()))
            except (OSError, ValueError, TypeError, KeyError) as e:
                error = self._damaged(int(path.parts[-3]), f"its metrics can't be read: {e}")
                if not self._saves or isinstance(error, OutOfReach):
                    raise error from e
                self._set_aside(int(path.parts[-3]), error)

    def _open(self) -> ocp.CheckpointManager:
        process = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            create=False,
            read_only=not self._saves,
            save_interval_steps=int(self._saves),
            # Out of the way by one renaming: half a deleted checkpoint would look like a damaged one.
            todelete_subdir=DELETED if self._saves else None,
            enable_async_checkpointing=False,
            # A process by itself, as far as orbax is concerned: the state is whole in each.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process_{process}"
            )
            if jax.process_count() > 1
            else ocp.options.MultiprocessingOptions(),
            best_fn=rank,  # without one, orbax stores no metrics for the policy below
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [
                    preservation_policy.LatestN(2),
                    preservation_policy.BestN(
                        get_metric_fn=self._rank_if_kept, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
        )
        logger = logging.getLogger("absl")
        logger.addFilter(_is_news)
        try:
            return ocp.CheckpointManager(self._folder, item_names=(*PARTS, "metadata"), options=options)
        finally:
            logger.removeFilter(_is_news)

    def save(
        self,
        parts: Parts,
        metadata: Json,
        validation: dict[str, float] | None,
        *,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Begins to save a state under its step number, which is training['step'], once the save before is done.

        Args:
          parts: the state's, as plain arrays; copied before this returns.
          metadata: JSON values to be saved with it.
          validation: its accuracy and loss where it was evaluated.
          first: what must succeed before, in the thread that saves; it may raise OSError.
        """
        if not self._saves:
            return
        # A copy, because the next dispatch takes the state's buffers; of this process's, because orbax
        # takes no array that only one of several processes has, unless it is NumPy's.
        parts = jax.tree.map(lambda leaf: np.array(leaf, copy=True), parts)
        step = int(parts["training"]["step"])
        content = {
            **metadata,
            "validation": validation,
            "checksums": {name: _checksums(parts[name]) for name in PARTS},
        }
        metrics = None if validation is None else {**validation, "step": step}
        item = _Item(step, parts, {"content": content, "checksum": _json_checksum(content)}, metrics)
        self.wait()
        if metrics is not None:
            self._unsaved = [waiting for waiting in self._unsaved if waiting.step != step]
        if all(waiting.step != step for waiting in self._unsaved):
            self._unsaved.append(item)
        self._saving = self._worker.submit(self._save_all, first)

    def _save_all(self, first: Callable[[], None]) -> str | None:
        """Saves what is waiting, in order; says what went wrong, or None."""
        try:
            first()
        except Exception as e:
            self._forget()
            return _reason(e)
        try:
            while self._unsaved:
                item = self._unsaved[0]
                self._check_room(item)
                if item.step in self._manager.all_steps():
                    # A run that was stopped before it measured its model has done so now.
                    self._manager.delete(item.step)
                self._manager.save(
                    item.step,
                    args=ocp.args.Composite(
                        **{name: ocp.args.StandardSave(item.parts[name]) for name in PARTS},
                        metadata=ocp.args.JsonSave(item.metadata),
                    ),
                    metrics=item.metrics,
                    force=True,
                )
                self._unsaved.pop(0)
                self._delete()
        except Exception as e:  # orbax and tensorstore raise many kinds
            self._clear_half_saved()
            self._forget()
            return _reason(e)
        return None

    def _check_room(self, item: _Item) -> None:
        """Asks for room beforehand: a save that fails on its way leaves debris, and threads that complain."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(item.parts)) + OVERHEAD_BYTES
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _rank_if_kept(self, metrics: Json) -> Rank:
        return rank(metrics) if self._lasts(metrics["step"]) else (-1.0, 0.0, 0)

    def _take_back(self) -> None:
        """Puts back what a process that died had deleted to save it anew, with what it measured, and had not saved."""
        last = max(saved_steps(self._folder), default=-1)
        for path in (self._folder / DELETED).glob("[0-9]*"):
            if int(path.name) > last:
                path.rename(self._folder / path.name)

    def _delete(self) -> None:
        shutil.rmtree(self._folder / DELETED, ignore_errors=True)

    def _clear_half_saved(self) -> None:
        # Orbax would do so when it opens a folder, but in a thread, which fails where the debris is gone when it looks,
        # and every save after it.
        for debris in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(debris, ignore_errors=True)

    def _forget(self) -> None:
        """Of what can't be saved, keeps in memory what would be kept on disk."""
        measured = [item for item in self._unsaved if item.metrics is not None]
        best = max(measured, key=lambda item: self._rank_if_kept(item.metrics), default=None)
        self._unsaved = [item for item in self._unsaved if item is best or item in self._unsaved[-2:]]

    def wait(self) -> str | None:
        """Waits for the save under way; says what went wrong with the last one, or None."""
        return None if self._saving is None else self._saving.result()

    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._saving is not None and not self._saving.done()

    def steps(self) -> list[int]:
        """The steps of all checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        for later in self.steps() if self._saves else ():
            if later > step:
                self._manager.delete(later)
        if self._saves:
            self._delete()

    def set_aside_damaged(self, shapes: Parts) -> dict[int, str]:
        """Moves the checkpoints that can't be read whole into a folder beside; a sentence for each step.

        Args:
          shapes: as in `restore`, of all parts.

        Raises:
          OutOfReach: whether one is whole can't be told at the moment.
        """
        for step in self.steps() if self._saves else ():
            try:
                self.check(step, shapes)
            except OutOfReach:
                raise
            except CheckpointError as e:
                self._set_aside(step, e)
        if self._aside:
            self._manager.close()
            self._manager = self._open()
        return self._aside

    def check(self, step: int, shapes: Parts) -> None:
        """Reads all of a checkpoint; arguments and errors as in `restore`."""
        self.restore(step, shapes)
        # Orbax goes by a file of its own when it chooses which checkpoints to keep.
        wanted = self.validation(step)
        if self._manager.metrics(step) != (wanted and {**wanted, "step": step}):
            raise self._damaged(step, "its metrics are not those that were saved")

    def _set_aside(self, step: int, error: CheckpointError) -> None:
        place = self._folder.with_name(DAMAGED)
        place.mkdir(exist_ok=True)
        number = next(n for n in range(10_000) if not (place / f"{step}-{n}").exists())
        (self._folder / str(step)).rename(place / f"{step}-{number}")
        self._aside[step] = f"Checkpoint {step} is set aside, in {place / f'{step}-{number}'}. {error}"

    def refresh(self) -> None:
        """Looks again at what is in the folder, where another process saves."""
        if not self._saves:
            self._manager.reload()

    def last_step(self) -> int | None:
        """The newest checkpoint's step; None where there is none."""
        return max(self.steps(), default=None)

    def best_step(self, counts: Callable[[int], bool] = lambda step: True) -> int | None:
        """The step of the best checkpoint that was evaluated, of those that count; None where none was."""
        steps = filter(counts, self.steps())
        ranks = [rank({**found, "step": step}) for step in steps if (found := self.validation(step))]
        return -max(ranks)[2] if ranks else None

    def validation(self, step: int) -> dict[str, float] | None:
        """Accuracy and loss on the validation set at a checkpoint; None where it was not evaluated.

        Raises:
          CheckpointError: as `metadata`.
        """
        found: dict[str, float] | None = self.metadata(step)["validation"]
        return found

    def metadata(self, step: int) -> Json:
        """The JSON values saved beside the checkpoint of a step, and its 'validation' and 'checksums'.

        Raises:
          CheckpointError: they can't be read.
        """
        metadata = self._restore(step, metadata=ocp.args.JsonRestore())["metadata"]
        if "content" not in metadata or metadata.get("checksum") != _json_checksum(metadata["content"]):
            raise self._damaged(step, "its metadata are not those that were saved")
        return metadata["content"]

    def restore(self, step: int, shapes: Parts) -> Parts:
        """Parts of the state at a step, on this process's first device.

        Args:
          step: that of a checkpoint.
          shapes: of each part that is wanted the tree, with the shapes and dtypes of its arrays.

        Raises:
          CheckpointError: it can't be read, is not what was saved, or its tree is another.
        """
        wanted = {name: ocp.args.StandardRestore(on_one_device(tree)) for name, tree in shapes.items()}
        checksums = self.metadata(step)["checksums"]
        restored = self._restore(step, **wanted)
        for name in shapes:
            if _checksums(restored[name]) != checksums[name]:
                raise self._damaged(step, f"its {name} arrays are not those that were saved")
        return {name: restored[name] for name in shapes}

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # orbax and tensorstore raise many kinds
            raise self._damaged(step, str(e) or type(e).__name__) from e

    def _damaged(self, step: int, reason: str) -> CheckpointError:
        folder = self._folder / str(step)
        # Of a file that it may not read orbax says that it is not there.
        there = (folder, *folder.rglob("*")) if folder.exists() else ()
        if closed := [path for path in there if not os.access(path, os.R_OK)]:
            reason = f"{os.strerror(errno.EACCES)}: {closed[0]}"
        if any(text in reason for text in PASSING):
            return OutOfReach(
                f"The checkpoint {folder} can't be read at the moment ({_shortened(reason)}), which is no sign of "
                "damage. It was left as it is: mend that, and give the same command again."
            )
        return CheckpointError(
            f"The checkpoint {folder} can't be restored into this model ({_shortened(reason)}). "
            "It is damaged, or its work directory's config.json is not the one it was trained with. The command that "
            "trained the run, given again, sets aside what is damaged."
        )

    def close(self) -> None:
        """Waits for what is under way and releases the folder."""
        self._worker.shutdown()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _reason(error: Exception) -> str:
    if "No space left on device" in str(error):
        return "no space left on the disk"
    return _shortened(str(error)) or type(error).__name__


def _shortened(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def _checksums(tree: Any) -> dict[str, str]:
    """The SHA-256 of each array, with its dtype and shape, by its path."""
    found = {}
    for name, leaf in zip(tensor_names(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True):
        digest = hashlib.sha256(f"{leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
        found[name] = digest.hexdigest()
    return found


def _json_checksum(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
