"""The pages: each block of Python or shell is run by a test or marked as not run; links and names lead somewhere.

A block is marked by a comment on the line before it: `<!-- not run: REASON -->`. A block without a language is
shell where it begins with a command; otherwise it is what a command prints.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import pytest

from seqmnist_jax import rnn
from seqmnist_jax.data import protocols, references, sources

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
COMMANDS = ("python", "pip", "make", "tensorboard", "jupyter", "git", "srun", "#!/bin/bash", "export", "cd")

# Pages whose Python another test file runs, all of it.
PYTHON_ELSEWHERE = {"README.md", "docs/adding-a-cell.md"}  # test_readme, test_adding_a_cell
# Pages whose Python runs here, from top to bottom.
PYTHON_HERE = {
    "docs/adding-a-data-set.md",
    "docs/cells.md",
    "docs/commands.md",
    "docs/conventions.md",
    "docs/engine.md",
    "docs/gpu.md",
    "docs/protocols.md",
    "docs/using-rnn.md",
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
    pages = {block.page for block in ALL if block.language == "python" and block.not_run is None}
    assert pages == PYTHON_ELSEWHERE | PYTHON_HERE


def anchors(page):
    """What a link to a part of a page may end in, as GitHub names it."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if target.startswith("https:"):
            continue
        path, _, part = target.partition("#")
        to = (ROOT / page).parent / path if path else ROOT / page
        assert to.exists(), target
        assert not part or part in anchors(to.resolve().relative_to(ROOT)), target


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")]
    assert [name for name in pages if name != "README.md" and f"]({name})" not in index] == []


def defined_in(path):
    """The names that a module of the package defines at its top, in its tables too."""
    names = set()
    for node in ast.parse((ROOT / "seqmnist_jax" / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def test_the_architecture_page_names_what_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", page)  # `module`: `function`, `function`
    named += re.findall(r"\| `([\w/]+\.py)` \| ((?:`\w+`(?:, )?)+) \|", page)  # | `module` | `TABLE` |
    named += [(path, f"`{table}`") for table, path in re.findall(r"`([A-Z]+)` in `(models/\w+\.py)`", page)]
    assert len(named) > 20
    for path, names in named:
        assert set(re.findall(r"`(\w+)`", names)) <= defined_in(path), path
    assert "`MODES` in `launch.py`" in page
    assert re.search(r"^MODES = ", (ROOT / "launch.py").read_text(), re.M)
    files = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", page)
    assert all((ROOT / "seqmnist_jax" / path).exists() or (ROOT / path).exists() for path in files)
    packages = {path.parent.name for path in (ROOT / "seqmnist_jax").glob("*/__init__.py")}
    assert set(re.findall(r"│ (\w+) +│", page)) >= packages


def test_conventions(tmp_path):
    run_from_top("docs/conventions.md", tmp_path)


def test_protocols(tmp_path):
    run_from_top("docs/protocols.md", tmp_path)


def test_commands():
    names = run_from_top("docs/commands.md", ROOT)
    count = len(names["test"])
    assert (names["digits"] == names["test"].labels).mean() > 0.95
    shapes = [names[name].shape for name in ("probabilities", "features", "states")]
    assert shapes == [(count, 28, 10), (count, 64), (count, 28, 64)]


def test_using_rnn(tmp_path):
    names = run_from_top("docs/using-rnn.md", tmp_path)
    assert names["loss"] < 0.02, "always saying 1 has 0.17"
    x = names["x"]
    np.testing.assert_allclose(names["y"], names["layer"].apply(names["variables"], x), atol=1e-5)
    # What the page puts in the place of a Flax layer, with the same weights as that.
    net = names["Net"]()
    variables = net.init(jax.random.key(1), x)
    theirs = {"params": {"cell": rnn.to_flax(variables["params"]["rnn"])}}
    np.testing.assert_allclose(net.apply(variables, x), nn.RNN(nn.GRUCell(128)).apply(theirs, x), atol=1e-5)


def test_help_of_rnn_begins_with_all_that_it_has():
    assert set(rnn.__all__) <= set(re.findall(r"\w+", rnn.__doc__))


def test_the_table_of_protocols_is_the_code_s():
    text = (ROOT / "docs/protocols.md").read_text()
    table = {}
    for row in re.findall(r"^\| (`\w+` \|(?: `[\w:]+` \|){3} .*) \|$", text, re.M):
        name, *fields = re.findall(r"`([\w:]+)`", row)
        table[name] = fields, "on test" in row, re.findall(r"\[([^\]]+)\]\(([^)]+)\)", row)
    known = references.read()
    assert table == {
        name: (
            [p.permutation, p.split, p.scaling, p.selection],
            p.selection.startswith("test"),
            [(known[p.reference].short, known[p.reference].url), ("code", f"https://{p.code}")] if p.reference else [],
        )
        for name, p in protocols.PROTOCOLS.items()
    }


def test_papers_are_named_as_the_references_have_them():
    named = {reference.url: reference.short for reference in references.read().values()}
    told = {}
    for page in PAGES:
        links = re.findall(r"\[([^\]]+)\]\((https://(?:arxiv|doi|medium|papers)\.[^)]+)\)", (ROOT / page).read_text())
        told |= {url: words for words, url in links}
    assert told == {url: named.get(url) for url in told}
    assert len(told) > 10


def test_engine(tmp_path, capsys):
    names = run_from_top("docs/engine.md", tmp_path)
    assert "MiB for the" in capsys.readouterr().out
    x, lengths = np.asarray(names["x"]), np.asarray(names["lengths"])
    y = np.zeros(3)
    for t in reversed(range(int(lengths[1]))):
        y = 0.9 * y + 0.1 * x[1, t]
    np.testing.assert_allclose(names["y"][1], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("page", ["docs/cells.md", "docs/gpu.md"])
def test_pages_whose_python_checks_itself(page, tmp_path):
    run_from_top(page, tmp_path)


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


# What makes a training short.
SHORT = (
    "--config.train.steps=4 --config.train.eval_every=2 --config.optimizer.schedule=constant "
    "--config.data.source=embedded --config.data.permutation=none --config.runtime.compilation_cache=none"
)
# The programs that pages call, as they stand in a page's folder. Trainings are short and nothing is installed. Make
# runs its targets that start launch.py, without setting up an environment; of the others it prints the commands.
PROGRAMS = {
    "python": f"""case "$*" in
  *--mode=describe*) exec "$PYTHON" "$@" --config.data.source=embedded ;;
  launch.py*--mode=*) exec "$PYTHON" "$@" ;;
  launch.py*hidden_size*) exec "$PYTHON" "$@" {SHORT} ;;
  launch.py*) exec "$PYTHON" "$@" {SHORT} --config.model.hidden_size=4 ;;
  *) exec "$PYTHON" "$@" ;;
esac""",
    "pip": 'test "$1" = install',
    "make": """case "$1" in
  run | evaluate) exec "$MAKE_PROGRAM" -f "$ROOT/Makefile" -o setup BIN=bin "$@" ;;
  *) exec "$MAKE_PROGRAM" -n -C "$ROOT" "$@" ;;
esac""",
}


@pytest.fixture
def sandbox(tmp_path):
    """What runs a script in a folder that looks like the repository, and gives what it printed."""
    for name in ("launch.py", "configs", "pretrained"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "MAKE_PROGRAM": shutil.which("make"),
        "ROOT": str(ROOT),
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("SEQMNIST_DATA_DIR", None)

    def run(script):
        command = ["bash", "-c", f"set -e\n{script}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


needs_shell = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("make") is None, reason="needs bash and make"
)


@pytest.mark.slow
@needs_shell
@pytest.mark.parametrize("page", sorted({block.page for block in RUN} - {"README.md"}))
def test_shell_runs(page, sandbox):
    """The commands of a page, from top to bottom in one folder."""
    for block in RUN:
        if block.page == page:
            sandbox("\n".join(commands(block)))


@pytest.mark.slow
@needs_shell
def test_readme_s_commands_run_and_print_what_it_shows(sandbox):
    shown = {"make run": [], "make evaluate": []}
    for command, block in zip(shown, (b for b in blocks("README.md") if b.language == ""), strict=True):
        shown[command] = re.findall(r"^[A-Za-z][a-z_ ]*[a-z]", block.text, re.M)
    assert shown["make run"][:2] == ["row_lstm", "Data"]
    assert shown["make evaluate"] == ["test accuracy", "steps read", "accuracy"]
    for block in RUN:
        for command in commands(block) if block.page == "README.md" else ():
            printed = sandbox(command)
            for label in shown.get(command, ()):
                assert re.search(rf"^{label}\b", printed, re.M), f"{command} prints no line {label!r}"
