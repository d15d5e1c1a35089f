"""RESULTS.md is what its command makes of the runs kept under results/."""

from pathlib import Path

from seqmnist_jax.analysis import table

ROOT = Path(__file__).parent.parent


def test_results_are_up_to_date():
    rows = table.rows(table.find([str(ROOT / "results")]))
    text = table.as_markdown(rows, table.read_published(ROOT / "results" / "published.csv"))
    introduction = (ROOT / "results" / "introduction.md").read_text()
    assert (ROOT / "RESULTS.md").read_text() == f"{introduction}{text}\n"


def test_only_summaries_and_metrics_are_kept():
    kept = {path.name for path in (ROOT / "results").rglob("*") if path.is_file()}
    assert kept == {"summary.json", "metrics.jsonl", "published.csv", "introduction.md", "table.csv"}
