"""The code on the pages: each block of Python or shell is run by a test, or marked as not run.

A block is marked by a comment on the line before it: `<!-- not run: REASON -->`. A block without a language is
shell where it begins with a command; otherwise it is what a command prints.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest

from seqmnist_jax.data import protocols, sources

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
COMMANDS = ("python", "pip", "make", "tensorboard", "jupyter", "git", "srun", "#!/bin/bash", "export", "cd")

# Blocks of Python that another test runs, by a part of each.
PYTHON_ELSEWHERE = {
    "README.md": ("my_step", "rnn.init_gru, x.shape[-1]", "rnn.from_flax"),  # test_readme
    "docs/adding-a-cell.md": ("",),  # test_adding_a_cell: all
}


class Block(NamedTuple):
    """A fenced block: where it begins, what it is in ('python', 'shell', or else), and why it is not run, if so."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None


def blocks(page):
    text = (ROOT / page).read_text()
    found = []
    for match in re.finditer(
        r"^(?:<!-- not run: (?P<reason>.*) -->\n)?```(?P<of>.*)\n(?P<text>(?:.*\n)*?)```$", text, re.M
    ):
        language = match["of"]
        is_command = not language and re.sub(r"^(\w+=\S+ )*", "", match["text"]).startswith(COMMANDS)
        if language in ("sh", "bash", "shell", "console") or is_command:
            language = "shell"
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, language, match["text"], match["reason"]))
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def run_from_top(page, folder):
    """What the blocks of Python of a page, in order, have defined."""
    names = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(page):
            if block.language == "python" and block.not_run is None:
                # Blank lines before it, so that an error names its line of the page.
                exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), names)
    return names


def test_the_blocks_are_found():
    assert {block.page for block in ALL if block.language == "python"} >= {"README.md", "docs/engine.md"}
    fences = sum((ROOT / page).read_text().count("```") for page in PAGES)
    assert fences == 2 * len(ALL)


def test_a_mark_has_a_reason_and_stands_at_a_block():
    for page in PAGES:
        marks = (ROOT / page).read_text().count("<!-- not run")
        reasons = [block.not_run for block in blocks(page) if block.not_run is not None]
        assert len(reasons) == marks
        assert all(len(reason.split()) > 1 for reason in reasons)


def test_every_block_of_python_has_its_test():
    from_top = {"docs/conventions.md", "docs/engine.md", "docs/gpu.md", "docs/adding-a-data-set.md"}
    for block in ALL:
        if block.language != "python" or block.not_run is not None or block.page in from_top:
            continue
        elsewhere = PYTHON_ELSEWHERE.get(block.page, ())
        known = [part for part in (*elsewhere, "seqmnist_jax.load") if part in block.text]
        assert known, f"{block.page}, line {block.line}: no test runs this block"


def test_readme_loads_a_trained_model():
    (block,) = (block for block in blocks("README.md") if "seqmnist_jax.load" in block.text)
    names = {"images": np.zeros((3, 28, 28), np.uint8)}
    text = block.text.replace('"runs/row_lstm/..."', repr(str(ROOT / "pretrained/row_lstm")))
    assert text != block.text
    exec(text, names)
    assert names["digits"].shape == (3,)


def test_conventions(tmp_path):
    run_from_top("docs/conventions.md", tmp_path)


def test_the_table_of_protocols_is_the_code_s():
    text = (ROOT / "docs/conventions.md").read_text()
    table = {}
    for row in re.findall(r"^\| (`\w+` \|(?: `[\w:]+` \|){3} .*) \|$", text, re.M):
        name, *fields = re.findall(r"`([\w:]+)`", row)
        table[name] = fields, "on test" in row
    assert table == {
        name: ([p.permutation, p.split, p.scaling, p.selection], p.selection.startswith("test"))
        for name, p in protocols.PROTOCOLS.items()
    }


def test_engine(tmp_path, capsys):
    names = run_from_top("docs/engine.md", tmp_path)
    assert "MiB for the way back" in capsys.readouterr().out
    x, lengths = np.asarray(names["x"]), np.asarray(names["lengths"])
    y = np.zeros(3)
    for t in reversed(range(int(lengths[1]))):
        y = 0.9 * y + 0.1 * x[1, t]
    np.testing.assert_allclose(names["y"][1], y, rtol=1e-5, atol=1e-6)


def test_gpu(tmp_path):
    run_from_top("docs/gpu.md", tmp_path)


def test_adding_a_data_set(tmp_path):
    with mock.patch.dict(sources.SOURCES):
        names = run_from_top("docs/adding-a-data-set.md", tmp_path)
    assert names["summary"]["dataset"]["sizes"] == {"train": 1000, "validation": 200, "test": 300}
    assert names["summary_of_two"]["dataset"]["name"] == "bars"
    assert names["accuracy"] > 0.8, "chance is 0.5"


def commands(block):
    """The commands of a shell block, without the optional parts of a synopsis."""
    text = re.sub(r" \[-[^\]]*\]", "", block.text).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


SHELL = [block for block in ALL if block.language == "shell"]
RUN = [block for block in SHELL if block.not_run is None]


def test_commands_name_what_is_there():
    """Also of blocks that are not run: configs, modules, make's targets, extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for block in SHELL:
        for command in commands(block):
            where = f"{block.page}, line {block.line}: {command}"
            for path in re.findall(r"configs/\S+\.py|launch\.py", command):
                assert (ROOT / path).exists() or "NAME" in path, where
            for module in re.findall(r"python -m ([\w.]+)", command):
                path = ROOT / module.replace(".", "/")
                assert path.is_dir() or path.with_suffix(".py").exists(), where
            for group in re.findall(r"pip install .*\.\[([\w,]+)\]", command):
                assert set(group.split(",")) <= extras.keys(), where
            for target in re.findall(r"^make (\w+)", command):
                assert target in targets, where


# What stands for a name in a synopsis, and what makes a training short. The shell's functions stand before the
# programs of those names: a folder and 'pip' are not set up anew for a page.
SHORT = (
    "--config.train.steps=4 --config.train.eval_every=2 --config.optimizer.warmup_steps=1 --config.model.hidden_size=4 "
    "--config.data.source=embedded --config.data.permutation=none --config.runtime.compilation_cache=none"
)
SETUP = f"""
set -e
python() {{
  case "$*" in
    *--mode=*) "$PYTHON" "$@" ;;
    launch.py*) "$PYTHON" "$@" {SHORT} ;;
    *) "$PYTHON" "$@" ;;
  esac
}}
pip() {{ test "$1" = install; }}
make() {{ command make -n -C "$ROOT" "$@"; }}
"""


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A folder that looks like the repository, with two trained runs, and what runs a script in it."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("launch.py", "configs"):
        (folder / name).symlink_to(ROOT / name)

    def run(script):
        environment = {**os.environ, "PYTHON": sys.executable, "ROOT": str(ROOT), "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            ["bash", "-c", SETUP + script], cwd=folder, env=environment, capture_output=True, text=True
        )

    for seed in (101, 102):  # none that a page trains too, which a table would refuse
        done = run(f"python launch.py --config configs/row_lstm.py --workdir runs/rows/{seed} --config.seed={seed}")
        assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("make") is None, reason="needs bash and make")
@pytest.mark.parametrize("block", RUN, ids=[f"{block.page}:{block.line}" for block in RUN])
def test_shell_runs(block, sandbox):
    script = "\n".join(commands(block))
    script = script.replace("DIR,DIR", "runs/rows/101,runs/rows/102").replace(
        "--workdir DIR", "--workdir runs/rows/101"
    )
    done = sandbox(script)
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
