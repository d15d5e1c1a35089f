"""Makes the trained model that ships with the repository: row_lstm on full MNIST.

    SEQMNIST_DATA_DIR=... make pretrained

Trains in a temporary folder and keeps what evaluation needs: config, data facts, summary,
metrics and the selected checkpoint, without any path of the machine that made them.
"""

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

from configs import row_lstm
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import train
from seqmnist_jax.workdir import files

TARGET = Path(__file__).parent / "row_lstm"


def main() -> None:
    """Trains and replaces the shipped folder."""
    config = row_lstm.get_config()
    config.model.norm = "batch"
    run = build_run(config)
    if run.task.dataset.name != "mnist":
        sys.exit("This model is trained on MNIST: set SEQMNIST_DATA_DIR to a folder with its four IDX files.")
    run = dataclasses.replace(run, config={**run.config, "runtime": {**run.config["runtime"], "data_dir": ""}})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        summary = train(run, folder)
        shutil.rmtree(TARGET, ignore_errors=True)
        step = str(summary["best_step"])
        shutil.copytree(folder / files.CHECKPOINTS / step, TARGET / files.CHECKPOINTS / step)
        for note in TARGET.rglob("commit_success.txt"):
            note.write_text("Made by pretrained/make.py.")  # orbax names the folder it saved to
        for kept in (files.CONFIG, files.DATA, files.SUMMARY, files.METRICS):
            shutil.copy(folder / kept, TARGET / kept)


if __name__ == "__main__":
    main()
