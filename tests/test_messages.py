"""Commands and flags that messages name: what is printed to be copied runs, and what is named is there."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest

from seqmnist_jax.cli import output
from seqmnist_jax.workdir import config as configs
from tests.launching import ROOT, launch

BEGIN = ["--config", str(ROOT / "configs" / "row_lstm.py"), "--config.data.source=embedded", "--config.train.steps=2"]
BEGIN += ["--config.model.hidden_size=4", "--config.train.batch_size=8", "--workdir=done run"]


def run(arguments, folder):
    environment = {name: value for name, value in os.environ.items() if name != "SEQMNIST_DATA_DIR"}
    done = launch(arguments, folder, environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--seeds=1-2"]], ids=["run", "sweep"])
def test_what_is_printed_after_a_training_runs(tmp_path, more):
    said = run([*BEGIN, *more], tmp_path).split("\nNext:\n")[1]
    look, page, board = (
        shlex.split(line.partition("   ")[0] or line) for line in said.replace("\n  ", "\n").splitlines()
    )
    for command in (look, page):
        assert (command[1], command[-1]) == (str(ROOT / "launch.py"), "done run")
        assert run(command[2:], tmp_path)
    assert (tmp_path / "done run" / "report.html").exists()
    assert board == ["tensorboard", "--logdir", "done run"]
    if not more:  # what it finds there, in place of a server
        inspect = [sys.executable, "-m", "tensorboard.main", "--inspect", *board[1:]]
        found = subprocess.run(inspect, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert "validation/accuracy" in found.stdout, found.stderr


def messages():
    """All text in the package and in launch.py but docstrings; of f-strings the parts that stand there."""
    for path in [*(ROOT / "seqmnist_jax").rglob("*.py"), ROOT / "launch.py"]:
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                yield path, node.value


def test_what_messages_say_to_install_is_what_the_package_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    known = " ".join([*project["dependencies"], *(name for names in extras.values() for name in names)])
    said = [words.split() for _, text in messages() for words in re.findall(r"pip install ([^)\n]*)", text)]
    assert len(said) == 3
    for words in said:
        for word in (word.strip("'.") for word in words if not word.startswith("-")):
            if extra := re.fullmatch(r"\[(\w+)\]", word):
                assert extra[1] in extras
            else:
                assert (ROOT / word).exists() or f"{word}>=" in known, word


def test_flags_that_messages_name_are_there():
    flags = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "launch.py").read_text()))
    named = [
        (path, flag)
        for path, text in messages()
        if "rnn" not in path.parts  # whose commands are compilers'
        for flag in re.findall(r"(?<![\w-])--([a-z_]+(?:\.[a-z_.]*\w)?)", text)
    ]
    assert len(named) > 30
    fields = {f"config.{name}" for name in configs.defaults()}
    others = {"logdir", "porcelain", "untracked", "xla_gpu_deterministic_ops"}  # of other programs
    assert [one for one in named if one[1] not in flags | fields | others] == []


def test_late_answers_to_a_read_that_failed_are_left_out(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    output.drop_late_answers()
    others = [SimpleNamespace(exc_value=error) for error in (RuntimeError("another"), OSError("Event loop"))]
    for unraisable in (SimpleNamespace(exc_value=RuntimeError("Event loop is closed")), *others):
        sys.unraisablehook(unraisable)
    assert told == others
