"""All that this repository says of a GPU, measured and checked by one command within ten minutes.

    bash benchmarks/gpu.sh [engine] [cells] [training] [checks] [--stretch=1] [--rehearse]

- engine: GRU and LSTM layers beside cuDNN, and their errors (`benchmarks.gpu_layers`);
- training: whole commands and training steps, eight seeds at once, the speedrun, and where a start goes;
- cells: cells that the engine knows from their steps alone;
- checks: runs saved on a CPU and read here, and the reverse; runs twice for the same bits; the engine's tests.

Each part, and each command in it, has a time limit, and what came out is written down after each: one that is slow or
fails takes nothing from the others. In the folder of `--out` then lie gpu.json, a log of each part, and
start.txt, a profile of a start. The tables come last.
"""

import concurrent.futures
import contextlib
import io
import json
import os
import pstats
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from benchmarks import gpu_layers, timing
from seqmnist_jax.workdir.metrics import read_events

FLAGS = flags.FLAGS
Json = dict[str, Any]
ROOT = Path(__file__).parent.parent

# Seconds that each part may take, in the order in which they run.
PARTS = {"engine": 190, "training": 200, "cells": 90, "checks": 115}
# Where a part that breaks off notes why.
PROBLEM = "problem"
SPEEDRUN_SEEDS = (10, 11, 12, 13, 14)
# The tests that a device matters to, but for those of the kernel for CPUs.
TESTS = (
    *("tests/rnn/test_device.py", "tests/parity/test_ten_steps.py", "tests/rnn/test_rnn_numpy.py"),
    *("tests/rnn/test_rnn_torch.py", "tests/rnn/test_backends.py", "tests/rnn/test_rnn_scan.py"),
    *("tests/rnn/test_rnn_lengths.py", "tests/rnn/test_rnn_transforms.py", "tests/parity/test_tcn_torch.py"),
)
NOT_TESTED = "not native and not any_shape"

# What makes everything small, for a rehearsal.
SMALL = (
    *("--config.data.source=embedded", "--config.model.hidden_size=8", "--config.train.steps=4"),
    *("--config.train.eval_every=100", "--config.optimizer.schedule=constant", "--config.train.batch_size=16"),
)
# A run measures its model on all images: of rows that is quick, of pixels it is not.
SMALL_ROWS = (*SMALL, "--config.data.view=row")


class Done(NamedTuple):
    """What a command came to: its exit code (None where it ran out of time), seconds, and standard output."""

    code: int | None
    seconds: float
    text: str


class Bench:
    """Runs commands within their limits, keeps their logs, and writes down what is known.

    Attributes:
      out, scratch: the folder for what stays, and for what does not.
      rehearse: whether all is small.
      content: what gpu.json holds.
    """

    def __init__(self, out: Path, scratch: Path, rehearse: bool, stretch: float = 1.0):
        self.out, self.scratch, self.rehearse, self.content = out, scratch, rehearse, dict[str, Any]()
        self._stretch = stretch
        self._end = float("inf")
        self._log = out / "gpu.log"
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)

    def begin(self, part: str, seconds: float) -> None:
        """From here on all commands belong to a part, and together may take so many seconds."""
        self._end = time.perf_counter() + self._stretch * seconds
        self._log = self.out / f"{part}.log"
        self._log.unlink(missing_ok=True)

    def run(self, name: str, command: Sequence[str], limit: float, **environment: str) -> Done:
        """Runs a command and logs it; ends it, and what it started, after `limit` seconds or with its part."""
        start = time.perf_counter()
        limit = min(self._stretch * limit, self._end - start)
        if limit < 2:
            self._tell(name, command, Done(None, 0.0, ""), "left out: the part's time is used up\n")
            return Done(None, 0.0, "")
        # Into files, because a pipe would wait for what a killed command has left running.
        with (self.scratch / f"{name}.out").open("w+") as out, (self.scratch / f"{name}.err").open("w+") as err:
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,  # and so no session, in which it would outlive whoever ends this process
            ) as process:
                try:
                    code: int | None = process.wait(limit)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            seconds = time.perf_counter() - start
            out.seek(0)
            err.seek(0)
            done = Done(code, seconds, out.read())
            self._tell(name, command, done, err.read())
        return done

    def _tell(self, name: str, command: Sequence[str], done: Done, errors: str) -> None:
        ended = "ran out of time" if done.code is None else f"exit code {done.code}"
        told = f"{name}: {done.seconds:.1f} s" + ("" if done.code == 0 else f", {ended}")
        head = f"$ {' '.join(command)}\n# {ended} after {done.seconds:.1f} s\n"
        text = f"{head}{errors[-200_000:]}\n{done.text[-200_000:]}\n"
        with self._lock, self._log.open("a") as file:
            print(told, flush=True)
            file.write(text)

    def note(self, part: str, name: str, facts: Any) -> None:
        """Writes something down, in memory and in gpu.json."""
        with self._lock:
            self.content.setdefault(part, {})[name] = facts
            half = self.out / "gpu.json.half"
            half.write_text(json.dumps(self.content, indent=1) + "\n")
            half.replace(self.out / "gpu.json")

    def launch(self, name: str, config: str, *overrides: str, limit: float, **environment: str) -> Json:
        """Trains a config by launch.py, into the folder of this name; what it came to."""
        small = SMALL_ROWS if self.rehearse else ()
        workdir = self.folder(name)
        command = ["launch.py", f"--config=configs/{config}.py", f"--workdir={workdir}", *small, *overrides]
        return tell(workdir, self.run(name, [sys.executable, *command], limit, **environment))

    def folder(self, name: str) -> Path:
        """The work directory of a run of this name."""
        return self.scratch / "runs" / name.replace(" ", "_")


def tell(workdir: Path, done: Done) -> Json:
    """What a run came to: its summary, and what of its time was neither training nor any other work that it counts."""
    events = read_events(workdir)
    rates = [event["steps_per_second"] for event in events if event["split"] == "train"]
    told: Json = {
        "wall_seconds": done.seconds,
        "exit_code": done.code,
        # The first window holds what happens once.
        "median_steps_per_second": statistics.median(rates[1:] or rates) if rates else None,
    }
    if not (workdir / "summary.json").exists():
        return told | {"steps": max((event["step"] for event in events), default=0)}
    summary = json.loads((workdir / "summary.json").read_text())
    kept = ("steps", "steps_per_second", "test_accuracy", "validation_accuracy", "test_loss", "parameters", "device")
    clock = {name: summary[name] for name in summary if name.endswith("_seconds")}
    told |= {name: summary[name] for name in kept} | clock
    return told | {"rest_seconds": done.seconds - sum(clock.values()), "versions": summary["versions"]}


# ---- The parts ---------------------------------------------------------------------------------


def layers(bench: Bench, part: str, which: Sequence[str], small: Sequence[str]) -> None:
    """Layers against cuDNN and float64."""
    path = bench.scratch / f"{part}.json"
    command = [sys.executable, "-m", "benchmarks.gpu_layers", f"--json={path}"]
    if bench.rehearse:
        command += [f"--layers={','.join(small)}", "--steps=28", "--rounds=2", "--seconds=0.001"]
    else:
        command += [f"--layers={','.join(which)}"]
    # Half of the memory is PyTorch's.
    done = bench.run(part, command, PARTS[part], XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    for name, facts in (json.loads(path.read_text()) if path.exists() else {"rows": []}).items():
        bench.note(part, name, facts)
    if done.code != 0:
        bench.note(part, PROBLEM, {"problem": f"not finished after {done.seconds:.0f} s; {part}.log says why"})


def engine(bench: Bench) -> None:
    """GRU and LSTM."""
    layers(bench, "engine", gpu_layers.LAYERS, ("gru:8:32", "lstm:8:16", "gru:8:32:2"))


def cells(bench: Bench) -> None:
    """Cells known from their steps alone."""
    layers(bench, "cells", gpu_layers.FIELD_LAYERS, [f"{cell}:8:16" for cell in gpu_layers.FIELD])


def training(bench: Bench) -> None:
    """Commands and training steps as a user has them."""

    def note(name: str, facts: Json) -> None:
        bench.note("training", name, facts)

    # Caches that are empty the first time; a rehearsal need not build what is in them.
    cache = {} if bench.rehearse else {"SEQMNIST_CACHE_DIR": str(bench.scratch / "cache")}
    note("row_lstm", bench.launch("row_lstm", "row_lstm", limit=50, **cache))
    note("pixel_gru", bench.launch("pixel_gru", "pixel_gru", limit=80, **cache))
    measured = bench.scratch / "speedrun.json"
    seeds = SPEEDRUN_SEEDS[:2] if bench.rehearse else SPEEDRUN_SEEDS
    command = ["-m", "benchmarks.time_to_accuracy", "--config=configs/speedrun/pixel_gru.py", f"--json={measured}"]
    command += [f"--seeds={','.join(map(str, seeds))}", *(SMALL_ROWS if bench.rehearse else ())]
    bench.run("speedrun", [sys.executable, *command], 80, JAX_COMPILATION_CACHE_DIR=str(bench.scratch / "speedrun"))
    note("speedrun", json.loads(measured.read_text()) if measured.exists() else {"rows": []})
    measured = bench.scratch / "replicas.json"
    command = ["-m", "benchmarks.replicas", "--config=configs/pixel_gru.py", "--counts=1,8", f"--json={measured}"]
    command += ["--config.train.batch_size=128", "--rounds=3", "--seconds=1", *(SMALL_ROWS if bench.rehearse else ())]
    bench.run("replicas", [sys.executable, *command], 60)
    note("replicas", json.loads(measured.read_text()) if measured.exists() else {"rows": []})
    note("row_lstm again", bench.launch("row_lstm again", "row_lstm", limit=40, **cache))
    start(bench)


def start(bench: Bench) -> None:
    """Where the time of a start goes: a short run under a profiler, its imports timed; into start.txt."""
    profile = bench.scratch / "start.profile"
    arguments = ["launch.py", "--config=configs/row_lstm.py", f"--workdir={bench.folder('start')}"]
    arguments += SMALL_ROWS if bench.rehearse else ["--config.train.steps=500"]
    command = [sys.executable, "-X", "importtime", "-m", "cProfile", "-o", str(profile), *arguments]
    if bench.run("start", command, 40).code is None:
        return
    imports = re.findall(r"^import time: +\d+ \| +(\d+) \| ( *\S+)$", (bench.scratch / "start.err").read_text(), re.M)
    imports = sorted(((int(spent), name) for spent, name in imports), reverse=True)[:60]
    text = io.StringIO()
    text.write("ms of an import with all that it imports\n")
    text.writelines(f"{spent / 1e3:8.0f} {name}\n" for spent, name in imports)
    if profile.exists():
        statistic = pstats.Stats(str(profile), stream=text)
        statistic.sort_stats("cumulative").print_stats(150)
        statistic.sort_stats("tottime").print_stats(50)
    (bench.out / "start.txt").write_text(text.getvalue())


def checks(bench: Bench) -> None:
    """Whether results hold on this device: runs and tests at the same time, as none is timed."""
    cpu, here = {"JAX_PLATFORMS": "cpu"}, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    wanted: list[tuple[str, str, list[str], dict[str, str]]] = [
        ("of the CPU", "row_lstm", ["--config.train.steps=250"], cpu)
    ]
    for name, config, count in (("rows", "row_lstm", 300), ("pixels", "speedrun/pixel_gru", 172)):
        for kind, fixed in (("deterministic", "true"), ("as it is", "false")):
            overrides = [f"--config.train.steps={count}", f"--config.runtime.deterministic={fixed}"]
            wanted += [(f"{name} {kind} {number}", config, overrides, here) for number in (1, 2)]
    with concurrent.futures.ThreadPoolExecutor(len(wanted) + 1) as pool:
        tested = pool.submit(tests, bench)
        trained = [pool.submit(bench.launch, n, c, *more, limit=70, **where) for n, c, more, where in wanted]
        for (name, *_), future in zip(wanted, trained, strict=True):
            bench.note("checks", name, future.result())
        for pair in ("rows deterministic", "rows as it is", "pixels deterministic", "pixels as it is"):
            both = [bench.folder(f"{pair} {number}") for number in (1, 2)]
            bench.note("checks", f"{pair}: two runs", equal_bits(*both))
        # Evaluation leaves nothing in the folder, so it can be read while its copy is trained.
        shutil.copytree(bench.folder("of the CPU"), bench.folder("resumed here"))
        read = {
            "made on the CPU, read here": pool.submit(evaluate, bench, "of the CPU", "here", here),
            "made here, read on the CPU": pool.submit(evaluate, bench, "rows deterministic 1", "on the CPU", cpu),
            "pixels made here, read on the CPU": pool.submit(
                evaluate, bench, "pixels deterministic 1", "on the CPU", cpu
            ),
        }
        resumed = bench.launch("resumed here", "row_lstm", "--config.train.steps=500", limit=60, **here)
        bench.note("checks", "made on the CPU, resumed here", resumed)
        for name, answer in read.items():
            bench.note("checks", name, answer.result())
        bench.note("checks", "tests", tested.result())


def equal_bits(one: Path, other: Path) -> Json:
    """Whether two runs are the same to the bit: their last checkpoints, by checksums, and their test logits."""
    found = []
    for workdir in (one, other):
        steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
        if not steps or not (workdir / "predictions.npz").exists():
            return {"problem": f"{workdir.name} has no result"}
        path = workdir / "checkpoints" / str(max(steps)) / "metadata" / "metadata"
        with np.load(workdir / "predictions.npz") as saved:
            found.append((json.loads(path.read_text())["content"]["checksums"], saved["logits"]))
    (sums, logits), (other_sums, other_logits) = found
    differing = [
        f"{part}/{name}" for part in sums for name in sums[part] if sums[part][name] != other_sums[part].get(name)
    ]
    return {
        "equal": not differing and logits.tobytes() == other_logits.tobytes(),
        "arrays": sum(map(len, sums.values())),
        "differing": differing,
        "largest_logit_difference": float(np.abs(logits - other_logits).max()),
    }


def evaluate(bench: Bench, name: str, where: str, environment: Mapping[str, str]) -> Json:
    """What a run's checkpoint is worth on another device, beside what its summary says."""
    workdir = bench.folder(name)
    command = [sys.executable, "launch.py", "--mode=evaluate", f"--workdir={workdir}", "--json"]
    done = bench.run(f"{name}, read {where}", command, 60, **environment)
    if done.code != 0:
        return {"problem": f"exit code {done.code}"}
    found, summary = json.loads(done.text), json.loads((workdir / "summary.json").read_text())
    return {
        "accuracy": found["accuracy"],
        "accuracy_of_the_run": summary["test_accuracy"],
        "images_changed_at_least": round(abs(found["accuracy"] - summary["test_accuracy"]) * found["examples"]),
        "loss_difference": found["loss"] - summary["test_loss"],
    }


def tests(bench: Bench) -> Json:
    """The tests of the engine, by pytest: how many passed, and which failed."""
    options = [*TESTS, "-k", NOT_TESTED, "-n", str(max(1, min(10, timing.cores() - 4)))]
    if bench.rehearse:
        options = ["tests/test_architecture.py", "-k", "rnn", "-n", "0"]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *options]
    done = bench.run("tests", command, 100, XLA_PYTHON_CLIENT_PREALLOCATE="false", OMP_NUM_THREADS="2")
    # Line by line, as one that runs out of time prints no sum. With several workers the result comes first.
    kinds = "PASSED|FAILED|ERROR|SKIPPED"
    results = re.findall(rf"^\[gw\d+\].* ({kinds}) (\S+)", done.text, re.M)
    results += [(result, name) for name, result in re.findall(rf"^(\S+::.*?) ({kinds})", done.text, re.M)]
    counts = {kind.lower(): sum(result == kind for result, _ in results) for kind in kinds.split("|")}
    failed = sorted({name for result, name in results if result in ("FAILED", "ERROR")})
    return {**counts, "failures": failed, "exit_code": done.code, "seconds": done.seconds}


# ---- The tables --------------------------------------------------------------------------------


def table(content: Mapping[str, Any]) -> str:
    """All that is written down, in short."""
    parts = [str(content.get("machine", {}).get("gpu"))]
    rows = [row for part in ("engine", "cells") for row in content.get(part, {}).get("rows", [])]
    if rows:
        parts.append(gpu_layers.table(rows))
    lines = [[part, content[part][PROBLEM]["problem"]] for part in PARTS if PROBLEM in content.get(part, {})]
    lines += [*_training_lines(content.get("training", {})), *_check_lines(content.get("checks", {}))]
    if lines:
        parts.append(timing.markdown(["what", "measured"], lines))
    return "\n\n".join(parts)


def _run_in_words(run: Mapping[str, Any]) -> str:
    if "test_accuracy" not in run:
        return f"not finished: step {run['steps']} after {run['wall_seconds']:.1f} s, exit code {run['exit_code']}"
    clocks = [name.removesuffix("_seconds") for name in run if name.endswith("_seconds")]
    shares = ", ".join(f"{name} {run[f'{name}_seconds']:.1f}" for name in clocks if name != "wall")
    return (
        f"{run['median_steps_per_second']:.0f} steps/s; {run['wall_seconds']:.1f} s in all ({shares}); "
        f"test {run['test_accuracy']:.2%}"
    )


def _training_lines(training: Mapping[str, Any]) -> list[list[str]]:
    lines = [[name, _run_in_words(run)] for name, run in training.items() if "wall_seconds" in run]
    if "speedrun" in training:
        told = [
            f"{row['train_seconds']:.2f} s" if row["reached"] else f"not reached ({row['validation_accuracy']:.2%})"
            for row in training["speedrun"]["rows"]
        ]
        lines.append(["speedrun to 98 % of validation, each seed", ", ".join(told)])
    if "replicas" in training:
        took = {row["replicas"]: row["milliseconds"] for row in training["replicas"]["rows"]}
        told = [f"{count}: {ms:.2f} ms a step" for count, ms in took.items()]
        factor = [f"{took[8] / took[1]:.2f} times as long"] if {1, 8} <= took.keys() else []
        lines.append(["seeds of pixel_gru at batch 128", ", ".join(told + factor)])
    return lines


def _check_lines(results: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for name, facts in results.items():
        if name == PROBLEM:
            continue
        if "problem" in facts:
            lines.append([name, facts["problem"]])
        elif "equal" in facts:
            difference = f"largest difference of a logit {facts['largest_logit_difference']:.1e}"
            differing = f"{len(facts['differing'])} of {facts['arrays']} arrays differ, {difference}"
            lines.append([name, "equal bits" if facts["equal"] else differing])
        elif "accuracy_of_the_run" in facts:
            words = f"{facts['accuracy']:.2%}, there {facts['accuracy_of_the_run']:.2%}; loss differs by"
            lines.append([name, f"{words} {facts['loss_difference']:.1e}"])
        elif "passed" in facts:
            failed = ", ".join(facts["failures"][:10])
            lines.append([name, f"{facts['passed']} passed, {len(facts['failures'])} failed: {failed}".rstrip(": ")])
        elif name == "made on the CPU, resumed here" or "test_accuracy" not in facts:
            lines.append([name, _run_in_words(facts)])
    return lines


def machine() -> Json:
    """What runs here, as the driver says it."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        gpu = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        gpu = "no GPU"
    return {"gpu": gpu, "cores": timing.cores(), "python": sys.version.split()[0]}


def define_flags() -> None:
    """The flags of this module as a command."""
    flags.DEFINE_string("out", "runs/gpu", "The folder for gpu.json and the logs.")
    flags.DEFINE_string("scratch", None, "A folder for what need not stay.", required=True)
    flags.DEFINE_float("stretch", 1.0, "All time limits, times this.")
    flags.DEFINE_bool("rehearse", False, "Tries everything at tiny sizes, on any device.")


def main(argv: list[str]) -> None:
    """Runs the parts, prints the tables."""
    chosen = argv[1:] or list(PARTS)
    if not set(chosen) <= PARTS.keys():
        raise app.UsageError(f"expected some of {', '.join(PARTS)}")
    begin = time.perf_counter()
    bench = Bench(Path(FLAGS.out).absolute(), Path(FLAGS.scratch), FLAGS.rehearse, FLAGS.stretch)
    for name, value in machine().items():
        bench.note("machine", name, value)
    for part, run in {"engine": engine, "training": training, "cells": cells, "checks": checks}.items():
        if part in chosen:
            bench.begin(part, PARTS[part])
            try:
                run(bench)
            except Exception as error:  # what breaks one part must not keep the others from running
                traceback.print_exc()
                bench.note(part, PROBLEM, {"problem": f"{type(error).__name__}: {error}"})
            bench.note("seconds", part, time.perf_counter() - begin)
    print(f"\n{table(bench.content)}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
