"""RESULTS.md is what its command makes of the runs kept under results/."""

import re
from pathlib import Path

import pytest

import seqmnist_jax
from benchmarks import bakeoff
from seqmnist_jax.analysis import results_page, table
from seqmnist_jax.data import references

ROOT = Path(__file__).parent.parent


def test_results_are_up_to_date(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = table.find(["results"])
    assert found.left_out == []
    page = results_page.as_markdown(
        table.rows(found.results), results_page.read_published(Path("results/published.csv"))
    )
    assert Path("RESULTS.md").read_text() == f"{Path('results/introduction.md').read_text()}{page}\n"


def test_the_bakeoff_is_up_to_date(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows, diverged, left_out = bakeoff.read(Path("results/bakeoff"))
    assert left_out == []
    page = bakeoff.page(rows, diverged, left_out, "bakeoff.svg" if rows else "")
    assert Path("docs/bakeoff.md").read_text() == Path("results/bakeoff/introduction.md").read_text() + "\n" + page


def test_only_summaries_and_metrics_are_kept():
    kept = {path.name for path in (ROOT / "results").rglob("*") if path.is_file()}
    results = {"summary.json", "metrics.jsonl", "diverged.json"}
    assert kept - results == {"published.csv", "introduction.md", "table.csv"}


def test_each_source_of_a_published_figure_is_in_the_references():
    known = references.read()
    keys = {cell for row in results_page.read_published(ROOT / "results" / "published.csv") for cell in row.values()}
    assert {cell for cell in keys if re.fullmatch(r"[a-z]+20\d\d\w*", cell)} <= known.keys()
    assert "[Kim and Park 2023](https://arxiv.org/abs/2304.02330)" in (ROOT / "RESULTS.md").read_text()


@pytest.mark.parametrize("key", references.read())
def test_a_reference_can_be_followed(key):
    reference = references.read()[key]
    assert all(reference.authors)
    assert reference.title
    assert re.fullmatch(r"(19|20)\d\d", reference.year)
    assert reference.year in key
    assert reference.url.startswith("https://")
    assert reference.short.startswith(reference.authors[0])


def test_all_entries_are_read():
    assert len(references.read()) == references.PATH.read_text().count("\n@")


def test_the_example_of_a_citation_is_a_row_s():
    page = (ROOT / "RESULTS.md").read_text()
    example = re.search(r"```bibtex\n(.*?)```", page, re.DOTALL)[1].replace("\\", "")
    name = re.search(r"row (r[0-9a-f]{6}): ", example)[1]
    result, origin = re.findall(rf"^\| `{name}` \| (.*)$", page, re.MULTILINE)[:2]
    (command,) = re.findall(rf"^- `{name}`: `(.*)`$", page, re.MULTILINE)
    for told in (result.split(" | ")[0], "0.1.0", f"commit {origin.split(' | ')[2]}", f"by {command}"):
        assert told in example
    assert re.search(r"([\d.]+) % (± [\d.]+)", example).expand(r"\1 \2") in result


def test_the_citation_has_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {seqmnist_jax.__version__}\n" in citation
    assert f"## {seqmnist_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
