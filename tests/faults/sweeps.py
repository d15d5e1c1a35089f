"""The life of a sweep: killed, a member removed, extended, moved, by jobs, with other configs, with divergence.

Members that are finished are never touched, and all are to the bit what they are in a sweep that nobody disturbed.
"""

import random
import shutil
import tempfile
import time
from pathlib import Path

from seqmnist_jax.workdir import files
from tests.faults import runs
from tests.faults.outcome import Outcome

SHORT = ("--config.train.steps=900",)
RATES = ("--config.optimizer.name=sgd", "--config.optimizer.clip.mask=none")
RATES += ("--config.sweep={'optimizer.learning_rate': (0.1, 3e38, 0.02)}",)


def campaign(tries: int, seed: int) -> list[Outcome]:
    """Kills a sweep so often, here and there in its life; each stage is a try of its own, too."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for where, arguments in (("two", ("--seeds=1-2",)), ("alone", ("--config.seed=3",)), ("rates", RATES)):
            code, _, errors = runs.finish(folder / where, *SHORT, *arguments)
            assert code == 0, errors
        wrong: list[str] = []
        life = folder / "life"
        stages = 0
        for stage in (_killed, _removed, _other_config, _extended, _moved, _by_jobs, _diverged):
            share = {_killed: tries // 3, _removed: tries // 3, _diverged: tries - 2 * (tries // 3)}.get(stage, 0)
            found = stage(folder, life, share, draw)
            wrong += [f"{stage.__name__.strip('_')}: {found}"] if found else []
            stages += 1
    note = "; ".join(wrong) or f"{stages} stages, all bit-identical"
    return [Outcome("a sweep's life", tries + stages, tries + stages - len(wrong), len(wrong), note)]


def _kill_and_finish(workdir: Path, kills: int, draw: random.Random, *arguments: str) -> str | None:
    """Kills it so often, each time at a random instant, and then lets it come to its end."""
    for _ in range(kills):
        process = runs.start(workdir, *SHORT, *arguments)
        before = _saved(workdir)
        while draw.random() < 0.7 and process.poll() is None and _saved(workdir) == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
    code, _, errors = runs.finish(workdir, *SHORT, *arguments)
    return f"exit code {code}: {errors[-300:]}" if code else None


def _saved(workdir: Path) -> list[int]:
    return [runs.progress(folder) for folder in sorted((workdir / files.REPLICAS).glob("*"))]


def _differ(reference: Path, workdir: Path, *names: str) -> str | None:
    found = (runs.is_same(reference / files.REPLICAS / name, workdir / files.REPLICAS / name) for name in names)
    return next((f"{name}: {one}" for name, one in zip(names, found, strict=True) if one), None)


def _content(workdir: Path, *names: str) -> dict[Path, bytes]:
    paths = [path for name in names for path in (workdir / files.REPLICAS / name).rglob("*") if path.is_file()]
    return {path.relative_to(workdir): path.read_bytes() for path in paths}


def _killed(folder: Path, life: Path, kills: int, draw: random.Random) -> str | None:
    return _kill_and_finish(life, kills, draw, "--seeds=1-2") or _differ(folder / "two", life, "seed=1", "seed=2")


def _removed(folder: Path, life: Path, kills: int, draw: random.Random) -> str | None:
    before = _content(life, "seed=1")
    shutil.rmtree(life / files.REPLICAS / "seed=2")
    wrong = _kill_and_finish(life, kills, draw, "--seeds=1-2")
    if _content(life, "seed=1") != before:
        return "a finished member was touched"
    return wrong or _differ(folder / "two", life, "seed=2")


def _other_config(folder: Path, life: Path, kills: int, draw: random.Random) -> str | None:
    before = {path: path.read_bytes() for path in life.rglob("*") if path.is_file()}
    for arguments in (("--seeds=1-2", "--config.model.hidden_size=9"), (), RATES):
        code, _, errors = runs.finish(life, *SHORT, *arguments)
        if code != 1 or "holds a" not in errors:
            return f"{arguments} ended with {code}: {errors[-300:]}"
    after = {path: path.read_bytes() for path in life.rglob("*") if path.is_file()}
    return None if after == before else "something was written for another config"


def _extended(folder: Path, life: Path, kills: int, draw: random.Random) -> str | None:
    before = _content(life, "seed=1", "seed=2")
    wrong = _kill_and_finish(life, 1, draw, "--seeds=1-3")
    if _content(life, "seed=1", "seed=2") != before:
        return "a finished member was touched"
    return wrong or runs.is_same(folder / "alone", life / files.REPLICAS / "seed=3")


def _moved(folder: Path, life: Path, kills: int, draw: random.Random) -> str | None:
    names = ("seed=1", "seed=2", "seed=3")
    before = _content(life, *names)
    shutil.move(life, folder / "elsewhere")
    wrong = _kill_and_finish(folder / "elsewhere", 0, draw, "--seeds=1-3")
    shutil.move(folder / "elsewhere", life)
    return wrong or (None if _content(life, *names) == before else "a finished member was touched")


def _by_jobs(folder: Path, life: Path, kills: int, draw: random.Random) -> str | None:
    before = _content(life, "seed=2", "seed=3")
    shutil.rmtree(life / files.REPLICAS / "seed=1")
    wrong = _kill_and_finish(life, 0, draw, "--seeds=1-3", "--config.runtime.executor=local")
    if _content(life, "seed=2", "seed=3") != before:
        return "a finished member was touched"
    return wrong or _differ(folder / "two", life, "seed=1")


def _diverged(folder: Path, life: Path, kills: int, draw: random.Random) -> str | None:
    wrong = _kill_and_finish(folder / "lives", kills, draw, *RATES)
    return wrong or _differ(folder / "rates", folder / "lives", "learning_rate=0.1", "learning_rate=0.02")
