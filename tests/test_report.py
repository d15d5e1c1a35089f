"""The report: its numbers from runs whole, unfinished and damaged; its text escaped; its JavaScript against JAX."""

import base64
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pixel_gru, row_lstm
from seqmnist_jax.analysis.evaluate import decided_at
from seqmnist_jax.analysis.report import build, page, reading
from seqmnist_jax.analysis.trained import TrainedModel
from seqmnist_jax.data.sources import load_embedded
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training.run import build_run
from seqmnist_jax.workdir import files

READ_ALL = """
const { network, view, images } = JSON.parse(require('fs').readFileSync(0));
const decoded = decodeNetwork(network);
const all = images.map((pixels) => beginReading(decoded, makeSequence(view, pixels)).advance(view.time));
process.stdout.write(JSON.stringify(all.map((one) => Array.from(one.probabilities))));
"""


def read_in_node(model, images):
    """Probabilities [count, time, classes] as the page's script computes them."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed, which runs the page's script here")
    told = {
        "network": reading.describe_network(model),
        "view": reading.describe_view(model.learner.view),
        "images": images.reshape(len(images), -1).tolist(),
    }
    script = page.static("recurrence.js") + READ_ALL
    done = subprocess.run(
        ["node", "-e", script], input=json.dumps(told), capture_output=True, text=True, check=True, timeout=300
    )
    return np.array(json.loads(done.stdout)).reshape(len(images), told["view"]["time"], -1)


def small(get_config, **changes):
    config = get_config()
    config.data.source = "embedded"
    config.runtime.backend = "scan"  # the reference
    config.model.hidden_size = 8
    config.train.batch_size = 16
    config.train.steps, config.train.eval_every = 24, 8
    for field, value in changes.items():
        section, name = field.split("__")
        config[section][name] = value
    return config


@pytest.fixture
def trained(tiny_run):
    return tiny_run[0]


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def data_of(text):
    """The JSON that a page holds."""
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.S)[1])


def said(report):
    return " ".join(report["run"]["notices"])


def test_a_finished_run(trained, tmp_path):
    out = build.write([trained], tmp_path / "report.html")
    text = out.read_text()
    run = data_of(text)["run"]
    summary = json.loads((trained / "summary.json").read_text())
    assert run["state"] == "finished"
    assert run["split"] == "test"
    assert run["score"]["accuracy"] == summary["test_accuracy"]
    assert "NOT on MNIST" in run["warnings"][0]
    assert list(run["notices"]) == []
    assert run["curves"]["loss"]["validation"]["steps"] == [20, 40, 60]
    assert len(run["gradients"]["units"][0]["norms"]) == 20
    assert data_of(text)["comparison"] is None
    sources = "".join(map(page.static, ("template.html", "report.css", *page.SCRIPTS)))
    assert set(re.findall(r"https?:[^'\" ]*", sources)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(", sources)
    assert not re.search(r"innerHTML|insertAdjacentHTML|\beval\(|new Function", sources)


def test_it_lands_in_the_folder_of_the_run(copy):
    assert build.write([copy]) == copy / "report.html"


def test_markup_in_a_config_stays_text(copy, tmp_path):
    evil = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> {{SCRIPT}}"
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["runtime"]["data_dir"] = evil
    path.write_text(json.dumps(config))
    text = build.write([copy], tmp_path / "report.html").read_text()
    assert "alert(1)</script>" not in text
    assert "<img" not in text
    assert ["runtime.data_dir", repr(evil)] in data_of(text)["run"]["config"]
    # The title is the folder's name.
    folder = copy.rename(copy.with_name("<b>&"))
    assert "<title>&lt;b&gt;&amp;: report</title>" in build.write([folder], tmp_path / "report.html").read_text()


def test_the_policy_names_the_script_and_the_style_that_are_there(trained, tmp_path):
    text = build.write([trained], tmp_path / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    script = re.search(r"<script>(.*)</script>", text, re.S)[1]
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert page._source(script) in policy
    assert page._source(style) in policy
    assert policy.startswith("default-src 'none'")


def test_a_run_selected_on_test_images_is_marked(copy):
    facts = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(
        json.dumps({**facts, "selection": "test:128", "caveats": ["selects on the test set"]})
    )
    run = build.gather([copy])["run"]
    assert "chosen on test images (test:128)" in run["warnings"][0]
    protocol = next(part["pairs"] for part in run["sections"] if part["title"] == "Protocol")
    assert ["Caveats", "selects on the test set"] in map(list, protocol)


def test_an_unfinished_run_says_so_and_leaves_the_test_set_alone(copy):
    for name in ("summary.json", "predictions.npz"):
        (copy / name).unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "split": "tr')  # a line that is being written
    run = build.gather([copy])["run"]
    assert run["state"] == "not finished"
    assert run["split"] == "validation"
    assert any("not finished" in notice and "60 steps" in notice for notice in run["notices"])
    assert run["headline"][0]["label"] == "validation accuracy"


def test_a_trial_leaves_the_test_set_alone(copy):
    summary = json.loads((copy / "summary.json").read_text())
    trial = {name: value for name, value in summary.items() if "test" not in name}
    (copy / "summary.json").write_text(json.dumps(trial))
    run = build.gather([copy])["run"]
    assert (run["state"], run["split"]) == ("finished", "validation")
    assert [told["label"] for told in run["headline"]].count("validation accuracy") == 1
    assert not any("test images are computed" in notice for notice in run["notices"])


def test_without_a_checkpoint_there_are_curves_and_no_network(copy):
    shutil.rmtree(copy / "checkpoints")
    report = build.gather([copy])
    assert "no checkpoint" in said(report)
    assert report["run"]["reading"] is None
    assert report["run"]["gradients"] is None
    assert report["run"]["curves"]["accuracy"]["train"]["steps"] == [20, 40, 60]
    assert report["run"]["score"] is not None
    assert len(report["run"]["digits"]["list"]) > 0


def test_damaged_predictions_are_named_and_made_anew(copy):
    before = build.gather([copy])["run"]["score"]
    (copy / "predictions.npz").write_bytes(b"PK\x03\x04 no more of it")
    report = build.gather([copy])
    assert "predictions.npz is damaged" in said(report)
    assert report["run"]["score"] == before


def test_data_that_are_gone(copy, monkeypatch):
    facts = json.loads((copy / "data.json").read_text())
    facts["content_hash"] = "0" * 64
    (copy / "data.json").write_text(json.dumps(facts))
    shutil.rmtree(copy / "checkpoints")
    report = build.gather([copy])
    assert "not at hand" in said(report)
    assert report["run"]["score"] is not None


def test_what_is_no_work_directory(tmp_path):
    with pytest.raises(files.WorkdirError, match="does not exist; expected a work directory"):
        build.write([tmp_path])
    with pytest.raises(UsageError, match="--workdir"):
        build.write([])


def test_runs_of_different_tasks_are_refused(trained, copy):
    facts = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps({**facts, "view": "pixel"}))
    with pytest.raises(UsageError, match=r"not set the same task(.|\n)*view: 'row' there, 'pixel' here"):
        build.gather([trained, copy])


def test_the_runs_under_a_folder_are_found(copy):
    shutil.copytree(copy, copy.parent / "under" / "a")
    shutil.copytree(copy, copy.parent / "under" / "b")
    assert build.write([copy.parent / "under"]) == copy.parent / "under" / "report.html"
    report = build.gather([copy.parent / "*"])
    assert [run["name"] for run in report["comparison"]["runs"]] == ["copy", "a", "b"]


def test_several_runs(trained, copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["seed"] = 7
    path.write_text(json.dumps(config))
    report = build.gather([trained, copy])
    comparison = report["comparison"]
    assert comparison["fields"] == ["seed"]
    assert [run["fields"] for run in comparison["runs"]] == [["0"], ["7"]]
    # The same predictions: nothing tells them apart.
    assert comparison["runs"][0]["mcnemar"] is None
    assert comparison["runs"][1]["mcnemar"]["p_value"] == 1.0
    assert comparison["runs"][0]["name"].endswith("tiny_run")


def test_warnings_of_other_runs_have_their_names_and_what_is_finished_is_shown(trained, copy):
    summary = json.loads((copy / "summary.json").read_text())
    lost = shutil.copytree(copy, copy.parent / "lost")
    (lost / "summary.json").write_text(json.dumps({**summary, "lost_checkpoints": [20]}))
    for name in ("summary.json", "predictions.npz"):
        (copy / name).unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "split": "validation", "loss": 0.0, "accuracy": 1.0, "seconds": 1.0}\n')
    report = build.gather([copy, trained, lost])
    assert report["run"]["name"] == "tiny_run"
    assert report["comparison"]["best"] == 1
    of_data, *others = report["run"]["warnings"]
    assert "NOT on MNIST" in of_data
    assert others == ["copy: The run has not ended.", "lost: Checkpoint 20, once the best, is lost."]


def test_each_sweep_has_its_ranking_and_runs_beside_it_their_means(trained, copy):
    def sweep(name, seeds):
        for seed in seeds:
            folder = shutil.copytree(trained, copy.parent / name / "replicas" / f"seed={seed}")
            summary = json.loads((folder / "summary.json").read_text())
            summary["identity"]["seed"] = summary["seed"] = seed
            summary["git_commit"] = name
            (folder / "summary.json").write_text(json.dumps(summary))
        mean = {"mean": 0.5, "std": None, "interval": None}
        entry = {"changes": {}, "replicas": [f"seed={seed}" for seed in seeds], "validation": mean, "test": mean}
        (copy.parent / name / "summary.json").write_text(json.dumps({"ranking": [entry], "diverged": []}))
        (copy.parent / name / "sweep.json").write_text("{}")
        return copy.parent / name

    one, two = sweep("one", (1, 2)), sweep("two", (3, 4))
    alone, both = build.gather([one])["comparison"], build.gather([one, two])["comparison"]
    assert ([told["sweep"] for told in alone["rankings"]], alone["recipes"]) == (["one"], [])
    assert [told["sweep"] for told in both["rankings"]] == ["one", "two"]
    assert [told["entries"][0]["runs"] for told in both["rankings"]] == ["2", "2"]
    (recipe,) = both["recipes"]
    assert recipe["seeds"] == [1, 2, 3, 4]
    assert "The seeds differ in commit." in recipe["warnings"]


def test_a_place_that_can_not_be_written_is_refused_before_the_work(copy, monkeypatch):
    monkeypatch.setattr(build, "gather", lambda workdirs: pytest.fail("it was read first"))
    for out, told in ((copy, "is a folder"), (copy / "none" / "report.html", "can't be written")):
        with pytest.raises(UsageError, match=rf"{told}.*--out"):
            build.write([copy], out)


def untrained(get_config, **changes):
    """A model with parameters and norm statistics drawn at random."""
    config = small(get_config, **changes)
    run = build_run(config)
    draw = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(draw.uniform(-1.0, 1.0, leaf.shape), leaf.dtype), run.learner.template.variables
    )
    # Variances among them.
    variables["batch_stats"] = jax.tree.map(abs, variables["batch_stats"])
    return TrainedModel(config, 0, run.task.facts(), variables, run.learner)


@pytest.mark.parametrize(
    ("get_config", "changes", "tolerance"),
    [
        (row_lstm.get_config, {"model__norm": "batch", "data__permutation": "numpy:100"}, 1e-5),
        (row_lstm.get_config, {"model__norm": "none", "model__num_layers": 2, "data__scaling": "standard"}, 1e-5),
        (pixel_gru.get_config, {"model__norm": "frozen", "optimizer__warmup_steps": 0}, 1e-5),
        # A state that is halfway between two bfloat16 may be rounded either way.
        (
            pixel_gru.get_config,
            {"model__precision": "bfloat16", "data__view": "row", "optimizer__warmup_steps": 0},
            5e-3,
        ),
    ],
    ids=["lstm", "two layers", "gru", "bfloat16"],
)
def test_the_pages_script_reads_as_jax_does(get_config, changes, tolerance):
    model = untrained(get_config, **changes)
    images = load_embedded().test.images[:10]
    found = read_in_node(model, images)
    assert np.ptp(found, axis=0).max() > 0.02  # the images make a difference
    np.testing.assert_allclose(found, model.read(images), atol=tolerance)


# Of `row_lstm`, without what a TCN does not read.
TCN = {"model__name": "tcn", "model__norm": "none", "model__dense_init": "glorot_uniform", "runtime__backend": "auto"}
DEEP = {**TCN, "model__name": "deep", "model__cell": "gru", "model__hidden_size": 64, "model__stages": "6x1, 8x1"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__cell": "min_gru", "runtime__backend": "auto"}, "this one is min_gru"),
        (TCN, "this model is another (model.name=tcn)"),
        (DEEP, "this model is another (model.name=deep)"),
        ({"model__bidirectional": True}, "reads both ways"),
    ],
    ids=["min_gru", "tcn", "deep", "both ways"],
)
def test_what_the_page_cannot_run_is_recorded(changes, reason):
    model = untrained(row_lstm.get_config, **changes)
    images = load_embedded().test.images[:3]
    assert reason in reading.why_not_live(model)
    assert reading.describe_network(model) is None
    recorded = reading.record(model, images)
    if recorded["probabilities"] is None:
        assert "both ways" in reason
    else:
        told = np.frombuffer(base64.b64decode(recorded["probabilities"]), np.uint8).reshape(3, 28, 10)
        np.testing.assert_allclose(told / 255, model.read(images), atol=0.003)
        leaders = np.frombuffer(base64.b64decode(recorded["leaders"]), np.uint8).reshape(3, 28)
        np.testing.assert_array_equal(leaders, model.read(images).argmax(-1))
    if recorded["states"] is None:
        assert "model.name=tcn" in reason
    else:
        told = np.frombuffer(base64.b64decode(recorded["states"]), np.int8).reshape(3, -1, recorded["units"])
        assert recorded["stride"] == (4 if "deep" in reason else 1) == 28 // told.shape[1]
        np.testing.assert_allclose(
            told / 127 * recorded["largest"], model.states(images), atol=recorded["largest"] / 200
        )


def test_the_step_from_which_the_answer_stays():
    predictions = np.array([[3, 3, 3], [1, 3, 3], [3, 1, 3], [1, 1, 3]])
    assert decided_at(predictions).tolist() == [1, 2, 3, 3]


def test_the_hardest_digits_come_first(trained):
    run = build.gather([trained])["run"]
    listed = run["digits"]["list"]
    losses = [one["loss"] for one in listed if one["hardest"]]
    assert losses == sorted(losses, reverse=True)
    assert len({one["index"] for one in listed}) == len(listed) == reading.HARDEST + reading.RANDOM
