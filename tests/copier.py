"""A compiler in whose place a shell script copies what was built before: tests of the build compile nothing."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import cells, recurrence
from seqmnist_jax.rnn.native import build
from seqmnist_jax.rnn.native.compiler import Source
from seqmnist_jax.rnn.native.cpu import calls
from seqmnist_jax.rnn.stages import Options, Stages

OPTIONS = Options("all", False, "float32")
# Of so many features x is multiplied inside, by a kernel that is the same for any number of them; units.
FEATURES, HIDDEN = 5, 3


class Built(NamedTuple):
    """A source, and the library that was built of it."""

    source: Source
    library: Path


@functools.cache
def stages(cell: str) -> Stages:
    """What the kernel of an 'lstm' or a 'gru' is made of."""
    step, init = {"lstm": (cells.lstm_step, cells.init_lstm), "gru": (cells.gru_step, cells.init_gru)}[cell]
    params = jax.eval_shape(lambda key: init(key, FEATURES, HIDDEN), jax.random.key(0))
    h, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, HIDDEN), (2, 4, FEATURES)))
    return recurrence.stages_of(recurrence.Call(step, OPTIONS, "cpu"), params, x, (h, h) if cell == "lstm" else h)


def built(folder: Path, *named: str) -> list[Built]:
    """The library that all cells share and those of the named ones, from the cache or built now.

    Raises:
      CannotBuildError: there is no compiler.
    """
    sources = [calls.LAUNCHER]
    for cell in named:
        file = folder / f"{cell}.cc"
        file.write_text(calls.text(stages(cell), OPTIONS.precision))
        sources.append(Source("cell", (file,)))
    return [Built(source, Path(build.library(source).library._name)) for source in sources]


def script(copied: list[Built], log: Path, before: str = "", answers: str = "echo copier 1.0") -> str:
    """Copies the library of a cell's source, and that of all cells for any other; the last argument is the target.

    Args:
      copied: what `built` gave.
      log: gets the process's number for each time.
      before: what is done before, in the shell; `$source` and `$target` are known.
      answers: what is done in answer to --version.
    """
    shared, *own = copied
    known = "\n".join(f'if cmp -s "$source" {one.source.files[0]}; then library={one.library}; fi' for one in own)
    return f"""#!/bin/sh
case "$*" in *--version) {answers}; exit;; esac
echo $$ >> {log}
while [ "$2" != -o ]; do shift; done
source=$1 target=$3 library={shared.library}
case $source in */cell.cc)
library=
{known}
;; esac
{before}
cp "$library" "$target"
"""
