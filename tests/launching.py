"""launch.py with arguments, in processes forked from one that has imported everything and started nothing.

A fork costs a tenth of a second, a new Python that imports JAX three. XLA leaves most of its optimizations, which cost
more than what they save here.
"""

import contextlib
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests.tiny import QUICK

ROOT = Path(__file__).parent.parent
PACKAGES = ("analysis", "cli", "training")
MODULES = [
    f"seqmnist_jax.{name}.{path.stem}" for name in PACKAGES for path in ROOT.glob(f"seqmnist_jax/{name}/[a-z]*.py")
]
PATIENCE = 300


class Done(NamedTuple):
    """How a process ended; the exit code is None where it had not within its time."""

    returncode: int | None
    stdout: str
    stderr: str


def launch(
    arguments: list[str], cwd: Path, environment: Mapping[str, str] | None = None, most_bytes: int | None = None
) -> Done:
    """What the shell would do: runs launch.py on the CPU in a folder, with this environment and memory limit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launch", *MODULES])
    # JAX reads these where it is imported, and modules are found from the folder where the server starts.
    with mock.patch.dict(os.environ, JAX_PLATFORMS="cpu", **QUICK), contextlib.chdir(ROOT):
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as name:
        logs = [Path(name) / kind for kind in ("out", "err")]
        given = (arguments, str(cwd), dict(os.environ if environment is None else environment), most_bytes, logs)
        process = context.Process(target=_launch, args=given)
        process.start()
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
            return Done(None, *(log.read_text(errors="replace") for log in logs))
        return Done(process.exitcode, *(log.read_text(errors="replace") for log in logs))


def _launch(
    arguments: list[str], cwd: str, environment: dict[str, str], most_bytes: int | None, logs: list[Path]
) -> None:
    """In the forked process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment | QUICK)
    for target, log in zip((1, 2), logs, strict=True):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), target)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    import jax
    from absl import app

    import launch

    jax.config.update("jax_platforms", environment.get("JAX_PLATFORMS", "cpu"))
    sys.argv = [str(ROOT / "launch.py"), *arguments]
    code = 0
    try:
        app.run(launch.main, flags_parser=launch.parse)
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
