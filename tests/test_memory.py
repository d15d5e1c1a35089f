"""How much memory there is, where control groups limit it."""

import pytest

from seqmnist_jax.devices import memory

pytestmark = pytest.mark.full_compiler

GIB = 2**30


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(folder, names, most, taken, cached):
    for name, value in zip(names[:2], (most, taken), strict=True):
        write(folder / f"memory.{name}", f"{value}\n")
    write(folder / "memory.stat", f"anon 17\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("own", "controllers", "place"),
    [
        ("0::/\n", "", "."),  # a container's, which sees itself as the root
        ("0::/slurm/job_1/step_0\n", "", "slurm/job_1"),  # a group above limits it
        ("5:cpu:/a\n4:memory:/docker/1\n0::/\n", "memory", "docker/1"),
    ],
)
def test_a_control_group_limits_what_there_is(tmp_path, monkeypatch, own, controllers, place):
    for name in ("meminfo", "own_groups", "groups"):
        monkeypatch.setattr(memory, name.upper(), tmp_path / name)
    write(tmp_path / "meminfo", "MemTotal:  9 kB\nMemAvailable:   16777216 kB\n")
    assert memory.available_bytes() == 16 * GIB
    write(tmp_path / "own_groups", own)
    assert memory.available_bytes() == 16 * GIB
    folder, names = tmp_path / "groups" / controllers / place, memory.OF_A_GROUP[controllers]
    group(folder, names, 4 * GIB, 3 * GIB, GIB // 2)
    assert memory.available_bytes() == GIB + GIB // 2
    write(folder / f"memory.{names[0]}", "max\n")
    assert memory.available_bytes() == 16 * GIB


def test_this_machine_says_how_much_there_is():
    assert memory.available_bytes() > 2**20
