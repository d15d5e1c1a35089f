"""Values of config fields that make no sense, through the real command line: one message, exit code 2, no traceback.

Each try is a process of its own, forked from one that has imported everything and started nothing.
"""

import contextlib
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from configs import default
from seqmnist_jax import config as configs
from seqmnist_jax import workdir as files
from tests.faults.outcome import Outcome
from tests.faults.runs import ROOT

# So small that a value which happens to be possible is soon tried.
TINY = {
    "data.source": "embedded",
    "model.hidden_size": 4,
    "train.batch_size": 8,
    "train.steps": 3,
    "train.eval_every": 2,
    "runtime.backend": "scan",
}
# What a value costs may be its own business: processes, schedulers and sweeps have tests of their own.
LEFT_OUT = {"runtime.distributed", "runtime.executor", "runtime.executor_options", "sweep"}
NUMBERS = ("-1", "0", "1", "2", "7", "-0.5", "0.5", "1.0", "1e-300", "1e300", "nan", "inf", "-inf", "1" * 40, "0x10")
BIG = ("1000", "100000", "2147483647", "2147483648", "4294967295", "4294967296", "9223372036854775808")
TEXTS = (
    "",
    " ",
    "None",
    "nan",
    "true",
    "no_such",
    "ROW",
    "ünïcode-✓",
    "../..",
    "a" * 3000,
    "{'a': 1}",
    "(1, 2)",
    "[",
    "%s%n",
)
SPECIAL = {
    "data.permutation": ("numpy:", "numpy:-1", "numpy:4294967296", "torch:x", "numpy:1:2", "bit_reversal", "none"),
    "data.split": ("first:-1", "first:0", "first:99999", "last:", "torch:5:x", "half", "first:1e3", "last:3999"),
    "data.selection": ("test", "test:0", "test:99999", "validation:2", "best"),
    "data.scaling": ("unit", "units", "standard", "0:1"),
    # More steps than these are possible, and take their time.
    "train.steps": ("-1", "0", "2", "2147483648", "1e3", "nan"),
    "runtime.mesh": ("replica:0,data:1", "replica:2,data:2", "data:", "auto,auto", "replica:1"),
}
MOST_SECONDS = 120
MOST_BYTES = 12 << 30
OTHER_MODULES = ("train", "sweep", "terminal", "signals", "compile_cache", "determinism", "distributed")


def campaign(tries: int, seed: int) -> list[Outcome]:
    """Draws a field and a value, or two of each, and starts a run with them."""
    draw = random.Random(seed)
    # A server that has imported it all, so that a try costs a fork and not three seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch", *(f"seqmnist_jax.{name}" for name in OTHER_MODULES)])
    counts = {"refused": 0, "trained": 0}
    wrong = []
    for _ in range(tries):
        values = drawn(draw)
        with tempfile.TemporaryDirectory() as name:
            found = _try(context, values, Path(name))
        if found in counts:
            counts[found] += 1
        else:
            wrong.append(f"{values}: {found}")
    note = f"{counts['refused']} refused with exit code 2, {counts['trained']} were possible and trained to their end"
    return [Outcome("config value", tries, tries - len(wrong), len(wrong), "; ".join([note, *wrong]))]


def drawn(draw: random.Random) -> dict[str, str]:
    """One or two fields with values that are mostly impossible."""
    fields = {
        name: value
        for name, value in configs.flatten(default.get_config().to_dict()).items()
        if name not in LEFT_OUT and name != "runtime.data_dir"
    }
    chosen = draw.sample(sorted(fields), draw.choice((1, 1, 1, 2)))
    return {field: draw.choice(_values(field, fields[field])) for field in chosen}


def _values(field: str, usual: Any) -> tuple[str, ...]:
    if field in SPECIAL:
        return SPECIAL[field] + TEXTS
    if isinstance(usual, str) or usual is None:
        return TEXTS
    return NUMBERS + BIG + TEXTS[:6]


def _try(context: Any, values: dict[str, str], folder: Path) -> str:
    """'refused', 'trained', or what went wrong."""
    process = context.Process(target=_launch, args=(values, str(folder)))
    process.start()
    process.join(MOST_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return f"no end within {MOST_SECONDS} s"
    said = (folder / "said").read_text(errors="replace")
    if "Traceback" in said:
        return f"a traceback: {said[-400:]}"
    if process.exitcode == 0:
        return _result(folder / "run")
    if process.exitcode != 2:
        return f"exit code {process.exitcode}: {said[-400:]}"
    errors = re.findall(r"^(?:error|FATAL Flags parsing error).*", said, re.MULTILINE)
    named = any(field in said or field.split(".")[-1] in said for field in values)
    return "refused" if errors and named else f"the message does not name the field: {said[-400:]}"


def _result(workdir: Path) -> str:
    metrics = (workdir / files.METRICS).read_text()
    return "trained" if "NaN" not in metrics and (workdir / files.SUMMARY).exists() else "a run with NaN"


def _launch(values: dict[str, str], folder: str) -> None:
    """In the forked process: what the shell would do."""
    os.chdir(folder)
    log = os.open("said", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # What asks for more memory than there is must not take it from others.
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    os.environ.pop("SEQMNIST_DATA_DIR", None)
    from absl import app

    import launch

    settings = {**TINY, **values}
    sys.argv = [
        str(ROOT / "launch.py"),
        f"--config={ROOT / 'configs' / 'default.py'}",
        "--workdir=run",
        *(f"--config.{field}={value}" for field, value in settings.items()),
    ]
    code = 0
    try:
        app.run(launch.main, flags_parser=launch._parse_flags)
    except SystemExit as e:
        code = 0 if e.code is None else e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
