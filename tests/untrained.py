"""Runs that nobody trained: every tensor of a small model drawn at random, saved as training would, in a second."""

import jax
import numpy as np

from configs import default
from seqmnist_jax.data.idx import write_idx
from seqmnist_jax.training.run import build_run
from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.checkpoints import Checkpoints

# Neither side is that of another size in the model.
HEIGHT, WIDTH = 7, 5
HIDDEN = 6
# What of a state is not zero.
DRAWN = ("params", "batch_stats")


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH), dtype=np.uint8)


def write_data(folder):
    """A data set of noise, as the four files of a folder."""
    folder.mkdir(exist_ok=True)
    for seed, (prefix, count) in enumerate((("train", 40), ("t10k", 20))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", random_images(count, seed))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return folder


def write_run(workdir, **changes):
    """Writes the folder of an unfinished run whose config is the default one with these changes, by dotted names."""
    config = default.get_config()
    given = {"data.source": "idx", "data.split": "first:10", "model.hidden_size": HIDDEN, "train.batch_size": 4}
    for field, value in {**given, **changes}.items():
        section, _, name = field.rpartition(".")
        place = config
        for part in section.split("."):
            place = place[part]
        place[name] = value
    config.runtime.data_dir = str(write_data(workdir.parent / "data"))
    run = build_run(config)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        numbers = 0.4 * rng.standard_normal(leaf.shape, np.float32)
        # A variance is positive, and so is the scale of a norm.
        is_positive = jax.tree_util.keystr(path).endswith(("['var']", "scale']"))
        return (np.abs(numbers) + 0.5 if is_positive else numbers).astype(leaf.dtype)

    template = run.learner.template.replace(key=None)  # shapes alone: nothing is compiled
    drawn = {name: jax.tree_util.tree_map_with_path(draw, getattr(template, name)) for name in DRAWN}
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
    state = state.replace(step=np.int32(7), key=jax.random.key(0), **drawn)
    workdir.mkdir(exist_ok=True)
    files.write_json(workdir / files.DATA, run.task.facts())
    files.write_json(workdir / files.CONFIG, run.config)
    with Checkpoints(workdir / files.CHECKPOINTS) as checkpoints:
        checkpoints.save(
            state.split(), {"config": run.config, "data": run.task.facts()}, {"accuracy": 0.5, "loss": 1.0}
        )
    return workdir
