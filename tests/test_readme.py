"""The main page: its size, and that its example of the library runs as it stands there."""

import re
from pathlib import Path

from seqmnist_jax.analysis import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_read_in_one_sitting():
    lines = README.splitlines()
    assert len(lines) <= 170
    assert [line for line in lines if len(line) > 100] == []


def test_the_library_s_example():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(block, names)
    assert names["h"].shape == (32, 128)
    assert names["outputs"].shape == (32, 100, 128)
    assert set(names["gradients"]) == set(names["params"])


def test_what_results_it_tells_are_those_of_the_results_page():
    """The mean accuracies of the four models, and of the longer recipes."""
    told = re.findall(r"^\| `(\w+)` \| .*? \| ([\d.]+) %", README, re.MULTILINE)
    assert [name for name, _ in told] == ["row_lstm_basic", "row_lstm", "pixel_gru", "permuted_gru"]
    rows = table.rows(table.find([str(ROOT / "results")]).results)
    means = {row["config"]: 100 * row["test_accuracy"] for row in rows}
    assert [accuracy for name, accuracy in told if abs(float(accuracy) - means[name]) > 0.051] == []
    longer = re.findall(r"[\d.]+(?= % on (?:rows|pixels|permuted))", README)
    assert longer
    assert set(longer) <= {f"{mean:.2f}" for config, mean in means.items() if config.startswith("best/")}
