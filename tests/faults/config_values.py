"""Values of config fields that make no sense, through the real command line: one message, exit code 2, no traceback."""

import os
import random
import tempfile
from pathlib import Path
from typing import Any

from configs import default
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files
from tests.faults.outcome import Outcome
from tests.launching import PATIENCE, ROOT, launch

# So small that a value which happens to be possible is soon tried.
TINY = {
    "data.source": "embedded",
    "model.hidden_size": 4,
    "train.batch_size": 8,
    "train.steps": 3,
    "train.eval_every": 2,
    "runtime.backend": "scan",
}
# Any text is a folder's name, and may be made; the last two are read beside other fields only, see COMBINATIONS.
LEFT_OUT = {"runtime.data_dir", "runtime.compilation_cache"}
LEFT_OUT |= {"data.name", "runtime.executor_options"}
NUMBERS = ("-1", "0", "7", "-0.5", "0.5", "1.0000001", "1e-300", "1e30", "1e300", "nan", "inf", "-inf")
NUMBERS += ("1" * 40, "\u0663", "1,2")
BIG = ("100000", "2147483647", "2147483648", "4294967296", "9223372036854775808")
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
    # More of these are possible, and take their time.
    "train.steps": ("-1", "0", "2", "2147483648", "1e3", "nan"),
    "model.num_layers": ("-1", "0", "2", "1001", "2147483648", "1.0", "nan"),
    "runtime.distributed": ("host", "host:1", "host:1,2", "host:1,2,2", "host:1,0,0", "host:-1,2,0", "a b:1,2,0"),
    "runtime.executor": ("local", "slurm", "no_such"),
    "sweep": (
        "{'seed': (nan,)}",
        "{'seed': ()}",
        "{'seed': (1, 1)}",
        "{'seed': ('a', 'b')}",
        "{'seed': (-1, 2)}",
        "{'seed': (0.5, 2)}",
        "{'sed': (1, 2)}",
        "{'model': (1, 2)}",
        "{'sweep': (1, 2)}",
        "{'train.steps': (0, 2)}",
        "{'optimizer.learning_rate': (-1.0, 1e-3)}",
        "{'model.dropout.input_keep': (0.0, 1.0)}",
        "__import__('os')",
    ),
    "runtime.mesh": ("replica:0,data:1", "replica:2,data:2", "data:", "auto,auto", "replica:1"),
}
# Each value may be possible, all together are not.
COMBINATIONS = (
    {"optimizer.schedule": "warmup_cosine", "optimizer.warmup_steps": "3"},
    {"optimizer.schedule": "warmup_cosine", "optimizer.warmup_steps": "1", "optimizer.final_fraction": "nan"},
    {"data.min_length": "29"},
    {"data.view": "pixel", "data.min_length": "785"},
    {"train.batch_size": "8", "train.accumulate": "3"},
    {"train.batch_size": "4001"},
    {"data.split": "first:4499", "train.batch_size": "2"},
    {"model.gate_bias": "chrono", "model.longest_time_scale": "1"},
    {"runtime.backend": "fused", "model.unroll": "2"},
    {"runtime.backend": "native", "model.unroll": "2"},
    {"model.name": "tcn", "model.dropout.input_keep": "0.5"},
    {"model.name": "tcn", "model.kernel_size": "2147483647"},
    {"data.protocol": "seqmnist", "data.permuted": "true", "data.permutation": "numpy:x"},
    {"data.selection": "test:501"},
    {"runtime.mesh": "replica:1,data:64"},
    {"model.hidden_size": "1000000", "model.num_layers": "1000"},
    {"model.hidden_size": "20000", "model.bidirectional": "true"},
    {"runtime.executor": "local", "sweep": ""},
    {"runtime.executor": "no_such", "sweep": "{'seed': (1, 2)}"},
    *(
        {"runtime.executor": "local", "sweep": "{'seed': (1, 2)}", "runtime.executor_options": options}
        for options in ("{", "[]", "{1: 2}", "{'no_such': 1}", "__import__('os')", "(" * 500)
    ),
    {"data.source": "tfds", "data.name": "no_such"},
    {"data.source": "tfds", "data.name": "../mnist"},
    {"seed": "2147483648", "sweep": "{'seed': (1, 2)}"},
)
# What asks for more memory than there is must not take it from others.
MOST_BYTES = 12 << 30


def campaign(tries: int, seed: int) -> list[Outcome]:
    """Draws a field and a value, or two of each, and starts a run with them."""
    draw = random.Random(seed)
    counts = {"refused": 0, "trained": 0, "diverged": 0}
    wrong = []
    for _ in range(tries):
        values = drawn(draw)
        with tempfile.TemporaryDirectory() as name:
            found = _try(values, Path(name))
        if found in counts:
            counts[found] += 1
        else:
            wrong.append(f"{values}: {found}")
    note = (
        f"{counts['refused']} refused with exit code 2, {counts['trained']} were possible and trained to their end, "
        f"{counts['diverged']} diverged and said so"
    )
    return [Outcome("config value", tries, tries - len(wrong), len(wrong), "; ".join([note, *wrong]))]


def drawn(draw: random.Random) -> dict[str, str]:
    """One or two fields with values that are mostly impossible, or some whose values don't go together."""
    if draw.random() < 0.15:
        return draw.choice(COMBINATIONS)
    every = configs.flatten(default.get_config().to_dict())
    fields = {name: value for name, value in every.items() if name not in LEFT_OUT}
    chosen = draw.sample(sorted(fields), draw.choice((1, 1, 1, 2)))
    return {field: draw.choice(_values(field, fields[field])) for field in chosen}


def _values(field: str, usual: Any) -> tuple[str, ...]:
    if field in SPECIAL:
        return SPECIAL[field] + TEXTS
    if isinstance(usual, str) or usual is None:
        return TEXTS
    return NUMBERS + BIG + TEXTS[:6]


def _try(values: dict[str, str], folder: Path) -> str:
    """'refused', 'trained', or what went wrong."""
    settings = {**TINY, **values}
    done = launch(
        [
            f"--config={ROOT / 'configs' / 'default.py'}",
            "--workdir=run",
            *(f"--config.{field}={value}" for field, value in settings.items()),
        ],
        folder,
        {name: value for name, value in os.environ.items() if name != "SEQMNIST_DATA_DIR"},
        MOST_BYTES,
    )
    if done.returncode is None:
        return f"no end within {PATIENCE} s"
    said = done.stdout + done.stderr
    if "Traceback" in said:
        return f"a traceback: {said[-400:]}"
    if done.returncode == 0:
        return _result(folder / "run")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if len(errors) != 1:
        return f"{len(errors)} errors, exit code {done.returncode}: {said[-400:]}"
    if done.returncode == 1 and "Training diverged" in errors[0] and (folder / "run" / files.DIVERGED).exists():
        return "diverged"
    if done.returncode != 2:
        return f"exit code {done.returncode}: {errors[0]}"
    # The message may go on below its first line.
    message = said[said.index(errors[0]) :]
    known = configs.flatten(default.get_config().to_dict())
    concerned = {*values, *(field for field in known if field in values.get("sweep", ""))}
    return "refused" if any(field in message for field in concerned) else f"no field is named: {message[-400:]}"


def _result(workdir: Path) -> str:
    summaries = list(workdir.rglob(files.SUMMARY))
    if not summaries:
        return "no summary of a run that ended well"
    told = [path.read_text() for path in (*summaries, *workdir.rglob(files.METRICS))]
    return "a run with NaN" if any("NaN" in text for text in told) else "trained"
