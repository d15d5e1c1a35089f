"""What the writers leave on disk."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from seqmnist_jax.workdir import files
from seqmnist_jax.workdir.metrics import JsonLinesWriter
from seqmnist_jax.workdir.tensorboard import TensorBoardWriter


def tensorboard_events(folder):
    """The events of all event files in a folder, by the TFRecord format."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            yield Event.FromString(content[place + 12 : place + 12 + length])
            place += 12 + length + 4


def test_json_lines_are_one_event_for_each_split(tmp_path):
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    writer.write_scalars(5, {"train/loss": 0.5, "train/accuracy": 0.25, "validation/loss": 0.75})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 5, "split": "train", "loss": 0.5, "accuracy": 0.25},
        {"step": 5, "split": "validation", "loss": 0.75},
    ]


def test_flushed_events_are_on_disk(tmp_path):
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    writer.write_scalars(1, {"train/loss": 0.5})
    writer.flush()
    assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    writer.close()


def test_synced_events_outlive_a_power_cut(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, os.fstat(file).st_size)))
    for path in (tmp_path / "metrics.jsonl", Path(os.devnull)):
        writer = JsonLinesWriter(path)
        writer.write_scalars(1, {"train/loss": 0.5})
        writer.sync()
        writer.close()
    there = (tmp_path / "metrics.jsonl").stat()
    assert synced == [(there.st_ino, there.st_size)]


def test_the_output_of_the_process_is_not_replaced(tmp_path, monkeypatch):
    renamed = []
    monkeypatch.setattr(os, "replace", lambda *names: renamed.append(names))
    with open(tmp_path / "out", "wb") as out:
        kept = os.dup(1)
        os.dup2(out.fileno(), 1)
        try:
            os.write(1, b"before, ")
            files.write_bytes(Path("/dev/stdout"), b"a table")
            os.write(1, b", after")
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    assert (renamed, (tmp_path / "out").read_bytes()) == ([], b"before, a table, after")


def test_tensorboard_gets_every_scalar(tmp_path):
    writer = TensorBoardWriter(tmp_path, first_step=0)
    writer.write_scalars(5, {"train/loss": 0.5, "validation/accuracy": 0.25})
    writer.write_scalars(10, {"train/loss": 0.125})
    writer.close()
    found = [
        (event.step, value.tag, value.simple_value)
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
    ]
    assert found == [(5, "train/loss", 0.5), (5, "validation/accuracy", 0.25), (10, "train/loss", 0.125)]


def test_tensorboard_gets_histograms_and_texts(tmp_path):
    writer = TensorBoardWriter(tmp_path, first_step=0)
    writer.write_histograms(250, {"gradient_norm_raw/dense/bias": np.array([1.0, 1.0, 3.0])})
    writer.write_texts(0, {"config": "seed = 0"})
    writer.close()
    values = {value.tag: value for event in tensorboard_events(tmp_path) for value in event.summary.value}
    histogram = values["gradient_norm_raw/dense/bias"].histo
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (3, 1.0, 3.0, 5.0)
    (text,) = [value for tag, value in values.items() if tag.startswith("config")]
    assert b"seed = 0" in text.tensor.string_val[0]


def test_a_resumed_run_supersedes_later_tensorboard_events(tmp_path):
    writer = TensorBoardWriter(tmp_path, first_step=7)
    writer.write_scalars(8, {"train/loss": 0.5})
    writer.close()
    starts = [event.step for event in tensorboard_events(tmp_path) if event.HasField("session_log")]
    assert starts == [7]


def test_nothing_written_leaves_no_tensorboard_file(tmp_path):
    TensorBoardWriter(tmp_path, first_step=0).close()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_does_not_write_leaves_nothing(tmp_path):
    writer = TensorBoardWriter(tmp_path, first_step=0, writes=False)
    writer.write_scalars(1, {"train/loss": 0.5})
    writer.write_texts(0, {"config": "seed = 0"})
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train/loss", "test/accuracy"])
def test_numbers_survive_json_exactly(tmp_path, name):
    writer = JsonLinesWriter(tmp_path / "m")
    writer.write_scalars(1, {name: 0.1 + 0.2})
    writer.close()
    assert json.loads((tmp_path / "m").read_text())[name.split("/")[1]] == 0.1 + 0.2
