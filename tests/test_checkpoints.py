"""Checkpoints: what is kept, that damage is noticed, that a disk which is full for a while loses nothing."""

import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.state import restore_state
from seqmnist_jax.workdir.checkpoints import CheckpointError, Checkpoints, OutOfReach
from tests import tiny


@pytest.fixture(scope="module")
def learner(cache_dir):
    return build_run(tiny.config()).learner


@pytest.fixture(scope="module")
def state(learner):
    return jax.jit(learner.init)()


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints") as found:
        yield found


def at(state, step):
    """The state, different at each step."""
    return state.replace(step=np.int32(step), params=jax.tree.map(lambda leaf: leaf + step, state.params))


def save(checkpoints, state, step, accuracy=None, **options):
    validation = None if accuracy is None else {"accuracy": accuracy, "loss": 1.0}
    checkpoints.save(at(state, step).split(), {"config": {"seed": 1}}, validation, **options)


def assert_restores(checkpoints, learner, state, step):
    restored = restore_state(checkpoints, step, learner.template)
    jax.tree.map(np.testing.assert_array_equal, restored.params, at(state, step).params)
    assert int(restored.step) == step


def test_the_last_two_and_the_best_are_kept(checkpoints, learner, state):
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, None), (40, 0.7), (50, 0.8)):
        save(checkpoints, state, step, accuracy)
    assert checkpoints.wait() is None
    assert checkpoints.steps() == [20, 40, 50]
    assert (checkpoints.best_step(), checkpoints.last_step()) == (20, 50)
    assert checkpoints.validation(20) == {"accuracy": 0.9, "loss": 1.0}
    assert_restores(checkpoints, learner, state, 20)


def test_an_end_that_a_longer_run_has_not_takes_no_place_of_the_best(tmp_path, state):
    with Checkpoints(tmp_path / "checkpoints", lasts=lambda step: step % 10 == 0) as found:
        for step, accuracy in ((10, 0.8), (20, 0.6), (30, 0.7), (33, 0.9)):
            save(found, state, step, accuracy)
        assert found.wait() is None
        assert found.steps() == [10, 30, 33]
        assert found.best_step() == 33


def test_what_is_saved_is_the_state_at_the_call(checkpoints, learner, state):
    """The buffers of a state are donated to the next dispatch while the save goes on."""
    given = jax.tree.map(lambda leaf: leaf.copy(), at(state, 5))
    changed = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    checkpoints.save(given.split(), {}, None)
    jax.block_until_ready(changed(given.params))
    assert checkpoints.wait() is None
    assert_restores(checkpoints, learner, state, 5)


class FullDisk:
    """Stands for orbax's manager on a disk that is full for so many saves."""

    def __init__(self, manager, failures):
        self._manager, self.failures = manager, failures

    def save(self, step, **given):
        if self.failures:
            self.failures -= 1
            (self._manager.directory / f"{step}.orbax-checkpoint-tmp").mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._manager.save(step, **given)

    def __getattr__(self, name):
        return getattr(self._manager, name)


def test_what_a_full_disk_refuses_is_saved_when_there_is_room(checkpoints, learner, state, tmp_path):
    checkpoints._manager = FullDisk(checkpoints._manager, failures=3)
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.6)):
        save(checkpoints, state, step, accuracy)
        assert checkpoints.wait() == "no space left on the disk"
        assert list((tmp_path / "run" / "checkpoints").iterdir()) == [], "nothing half-written takes more room"
    save(checkpoints, state, 40, 0.7)
    assert checkpoints.wait() is None
    assert checkpoints.steps() == [20, 30, 40], "as if nothing had happened"
    assert_restores(checkpoints, learner, state, 20)


def test_half_a_save_of_a_process_that_died_is_gone_when_the_folder_is_open(tmp_path, learner, state):
    (tmp_path / "10.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
    with Checkpoints(tmp_path, read_only=True):
        assert list(tmp_path.iterdir()) != [], "another process may be saving it"
    with Checkpoints(tmp_path) as checkpoints:
        assert list(tmp_path.iterdir()) == []
        save(checkpoints, state, 10)
        assert checkpoints.wait() is None
        assert_restores(checkpoints, learner, state, 10)


def test_what_cannot_be_read_at_the_moment_is_not_damaged(tmp_path, learner, state, monkeypatch):
    shapes = learner.template.shapes()

    def refuses(number):
        def refuse(*given, **options):
            raise OSError(number, os.strerror(number))

        return refuse

    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        for step in (10, 20):
            save(checkpoints, state, step, 0.5)
        assert checkpoints.wait() is None
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "restore", refuses(errno.EMFILE))
            with pytest.raises(OutOfReach, match="Too many open files"):
                checkpoints.set_aside_damaged(shapes)
            # Who runs the tests may be allowed to read all.
            patch.setattr(checkpoints._manager, "restore", refuses(errno.ENOENT))
            patch.setattr(os, "access", lambda path, mode: not path.match("20/model"))
            with pytest.raises(OutOfReach, match=r"Permission denied: .*/20/model"):
                checkpoints.check(20, shapes)
        assert checkpoints.set_aside_damaged(shapes) == {}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuses(errno.EACCES))
        with pytest.raises(OutOfReach, match="Permission denied"):
            Checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_what_was_deleted_to_be_saved_anew_is_taken_back_where_it_was_not(tmp_path, learner, state):
    for dies in (True, False):
        with Checkpoints(tmp_path) as checkpoints:
            for step in (10, 20) if dies else ():
                save(checkpoints, state, step)
            checkpoints.wait()
            if dies:
                checkpoints._manager = FullDisk(checkpoints._manager, failures=1)
            save(checkpoints, state, 20, 0.5)
            assert checkpoints.wait() == ("no space left on the disk" if dies else None)
            assert checkpoints.steps() == ([10] if dies else [10, 20])
            checkpoints._unsaved.clear()  # as by a process that dies
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.steps() == [10, 20]
            assert checkpoints.validation(20) == (None if dies else {"accuracy": 0.5, "loss": 1.0})
            assert_restores(checkpoints, learner, state, 20)
        assert not (tmp_path / "deleted").exists()


def test_of_what_waits_in_memory_only_what_would_be_kept_does(checkpoints, state):
    checkpoints._manager = FullDisk(checkpoints._manager, failures=100)
    for step in range(10, 100, 10):
        save(checkpoints, state, step, 0.9 if step == 30 else 0.5)
    checkpoints.wait()
    save(checkpoints, state, 90)  # as where a run diverges in the step after
    checkpoints.wait()
    assert [(item.step, item.metrics is None) for item in checkpoints._unsaved] == [
        (30, False),
        (80, False),
        (90, False),
    ]


def test_nothing_is_saved_before_what_must_come_first(checkpoints, state):
    def fails():
        raise OSError(errno.ENOSPC, "No space left on device")

    save(checkpoints, state, 10, first=fails)
    assert checkpoints.wait() == "no space left on the disk"
    assert checkpoints.steps() == []
    save(checkpoints, state, 20)
    assert checkpoints.wait() is None
    assert checkpoints.steps() == [10, 20]


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("part", ["model", "training"])
def test_a_flipped_bit_is_noticed_and_set_aside(checkpoints, learner, state, tmp_path, part):
    save(checkpoints, state, 10)
    save(checkpoints, state, 20)
    assert checkpoints.wait() is None
    victim = largest_file(tmp_path / "run" / "checkpoints" / "20" / part)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match="20 can't be restored"):
        restore_state(checkpoints, 20, learner.template)
    told = checkpoints.set_aside_damaged(learner.template.shapes())
    assert list(told) == [20]
    assert "damaged/20-0" in told[20]
    assert (tmp_path / "run" / "damaged" / "20-0").is_dir()
    assert checkpoints.steps() == [10]
    assert_restores(checkpoints, learner, state, 10)
    save(checkpoints, state, 20)
    assert checkpoints.wait() is None
    assert_restores(checkpoints, learner, state, 20)


def test_changed_metadata_are_noticed(checkpoints, state, tmp_path):
    save(checkpoints, state, 10, 0.5)
    assert checkpoints.wait() is None
    assert checkpoints.metadata(10)["config"] == {"seed": 1}
    (path,) = (tmp_path / "run" / "checkpoints" / "10" / "metadata").glob("metadata")
    stored = json.loads(path.read_text())
    stored["content"]["config"]["seed"] = 2
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="metadata are not those"):
        checkpoints.metadata(10)
