"""RESULTS.md is what its command makes of the runs kept under results/."""

from pathlib import Path

from seqmnist_jax.analysis import results_page, table

ROOT = Path(__file__).parent.parent


def test_results_are_up_to_date(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = table.find(["results"])
    assert found.left_out == []
    page = results_page.as_markdown(
        table.rows(found.results), results_page.read_published(Path("results/published.csv"))
    )
    assert Path("RESULTS.md").read_text() == f"{Path('results/introduction.md').read_text()}{page}\n"


def test_only_summaries_and_metrics_are_kept():
    kept = {path.name for path in (ROOT / "results").rglob("*") if path.is_file()}
    assert kept == {"summary.json", "metrics.jsonl", "published.csv", "introduction.md", "table.csv"}
