"""The report: from work directories to one HTML file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqmnist_jax.analysis import recorded
from seqmnist_jax.analysis.report import comparison, gradients, page, reading, runs, summary
from seqmnist_jax.errors import UsageError
from seqmnist_jax.workdir import config as configs
from seqmnist_jax.workdir import files, provenance

Json = dict[str, Any]

REPORT = "report.html"
MOST_RUNS = 200


def write(workdirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes a page about a run, or about several of one task, or about a sweep.

    Args:
      workdirs: folders with runs or sweeps in or under them, or patterns of a shell for such.
      out: the file; None for report.html in the folder where it is one, else in the current folder.

    Returns:
      The file.

    Raises:
      WorkdirError: a folder holds no run, or its config or data.json is damaged.
      UsageError: there are no runs or too many, they were not set the same task, or the file can't be written.
    """
    if out is None:
        out = workdirs[0] / REPORT if len(workdirs) == 1 and workdirs[0].is_dir() else Path(REPORT)
    if out.is_dir():
        raise UsageError(f"{out} is a folder; expected a file, as --out=report.html.")
    if not os.access(out.absolute().parent, os.W_OK):
        raise UsageError(f"{out} can't be written: {out.absolute().parent} is no folder, or read-only. Set --out.")
    report = gather(workdirs)
    files.write_bytes(out, page.render(report).encode(errors="replace"))  # a folder's name may be no text
    return out


def gather(workdirs: Sequence[Path]) -> Json:
    """All that the page shows, as JSON values; arguments and errors as in `write`.

    Returns:
      title; version, that of this package; run, the details of the run or of the best of several by validation;
      comparison, None for a run alone, else as `comparison.describe` has it.
    """
    folders, sweeps = _find(workdirs)
    facts = {folder: files.read_facts(folder) for folder in folders}
    comparison.check_one_task(facts)
    found = [runs.find(folder) for folder in folders]
    detailed = comparison.best(found) or found[0]
    is_alone = len(found) == 1 and not sweeps
    described = describe(detailed)
    config = provenance.config_title((detailed.summary or {}).get("command"))
    if not is_alone:
        described["warnings"] += _warnings_of_others(found, detailed, described["warnings"])
    return {
        "title": ", ".join(filter(None, (config, detailed.name))) if is_alone else f"{len(found)} runs compared",
        "version": provenance.versions()["seqmnist_jax"],
        "run": described,
        "comparison": None if is_alone else comparison.describe(found, sweeps),
    }


def _warnings_of_others(found: Sequence[runs.Found], detailed: runs.Found, said: Sequence[str]) -> list[str]:
    """What must be said of the runs that are not shown in detail, each thing once, with their names."""
    told: dict[str, list[str]] = {}
    names = comparison.names([one.workdir for one in found])
    for name, one in zip(names, found, strict=True):
        for warning in () if one is detailed else recorded.warnings(one.workdir, one.facts):
            told.setdefault(warning, []).append(name)
    of_all = {warning for warning, having in told.items() if len(having) == len(found) - 1 and warning in said}
    return [f"{', '.join(having)}: {warning}" for warning, having in told.items() if warning not in of_all]


def _find(workdirs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The folders of the runs, and those of the sweeps, in and under what is asked for; each once, in order."""
    folders: dict[Path, None] = {}
    sweeps: dict[Path, None] = {}
    for pattern in workdirs:
        for folder in files.matching(str(pattern)) or [pattern]:
            # A folder that holds no run is left to be refused by who reads it.
            below = sorted(path.parent for path in files.under(folder, files.CONFIG))
            folders |= dict.fromkeys(below or [folder])
            sweeps |= dict.fromkeys(path.parent for path in sorted(files.under(folder, files.SWEEP)))
    if not folders:
        raise UsageError("--mode=report needs --workdir, the folder of a run, or --workdirs, several.")
    if len(folders) > MOST_RUNS:
        raise UsageError(f"There are {len(folders):,} runs; one page shows at most {MOST_RUNS}.")
    return list(folders), list(sweeps)


def describe(found: runs.Found) -> Json:
    """A run's details, as JSON values."""
    opened = runs.open_run(found)
    answers, images = opened.answers, opened.images
    score = None if answers is None else answers.score
    digits = None
    if answers is not None and images is not None:
        digits = reading.choose_digits(images, answers.labels, answers.logits)
    return {
        "name": found.name,
        "state": found.state,
        "headline": summary.headline(opened, score),
        "sections": summary.sections(opened, score),
        "warnings": [
            *recorded.warnings(found.workdir, found.facts, opened.model.step if opened.model else None),
            *(opened.model.warnings if opened.model else ()),
        ],
        "notices": opened.notices,
        "config": [[name, repr(value)] for name, value in configs.flatten(found.config).items()],
        "curves": summary.curves(found.events),
        "best_step": None if found.summary is None else found.summary["best_step"],
        "gradients": gradients.describe(opened),
        "split": found.split,
        "score": score,
        "digits": digits,
        "reading": reading.describe(opened, digits),
    }
