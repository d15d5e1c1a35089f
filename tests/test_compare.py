"""Two runs compared from their folders, which are made here by hand."""

import json
import re
import shutil
import zipfile

import numpy as np
import pytest

from seqmnist_jax.analysis.compare import compare
from seqmnist_jax.cli import text as texts
from seqmnist_jax.errors import UsageError
from seqmnist_jax.workdir.files import WorkdirError, write_arrays, write_json

LABELS = np.arange(100, dtype=np.uint8) % 10
FACTS = {
    "name": "mnist",
    "source": "idx",
    "content_hash": "f7151d6e42dc" + "0" * 52,
    "image_shape": [28, 28],
    "num_classes": 10,
    "view": "row",
    "protocol": "seqmnist",
    "split": "first:5000",
    "scaling": "unit",
    "selection": "validation",
    "permutation": "none",
    "permutation_indices": None,
    "warning": None,
}
SUMMARY = {"selected_on": "validation", "best_step": 40, "steps": 50}


def make_run(folder, wrong=(), *, labels=LABELS, summary=None, **facts):
    """A finished run that has these places of the test set wrong, of a config of its own."""
    folder.mkdir()
    predictions = labels.copy()
    predictions[list(wrong)] = (predictions[list(wrong)] + 1) % 10
    logits = 4 * np.eye(10, dtype=np.float32)[predictions]
    write_json(folder / "data.json", {**FACTS, **facts})
    write_json(folder / "summary.json", {**SUMMARY, "identity": {"a": folder.name}, **(summary or {})})
    write_arrays(folder / "predictions.npz", labels=labels, predictions=predictions, logits=logits)
    return folder


@pytest.fixture
def good(tmp_path):
    return make_run(tmp_path / "good", wrong=[0, 1])


@pytest.fixture
def poor(tmp_path):
    return make_run(tmp_path / "poor", wrong=[1, *range(10, 20)])


def test_the_better_run_is_named_whichever_comes_first(good, poor):
    for pair in ((good, poor), (poor, good)):
        result = compare(*pair)
        assert str(good) in result["verdict"]
        assert str(poor) not in result["verdict"]
        assert "9.00 percentage points" in result["verdict"]


def test_counts_and_accuracies(good, poor):
    result = compare(good, poor)
    assert (result["examples"], result["dataset"]) == (100, "mnist")
    first, second = result["first"], result["second"]
    assert (first["accuracy"], second["accuracy"]) == (0.98, 0.89)
    assert first["accuracy_interval"][0] < 0.98 < first["accuracy_interval"][1]
    assert (first["best_step"], first["selected_on"]) == (40, "validation")
    test = result["mcnemar"]
    assert (test["both"], test["only_a"], test["only_b"], test["neither"]) == (88, 10, 1, 1)
    assert test["p_value"] == pytest.approx(2 * (1 + 11) / 2**11)
    assert test["accuracy_difference"] == pytest.approx(0.09)
    assert result["warnings"] == []
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_small_difference_gives_no_winner(good, tmp_path):
    near = make_run(tmp_path / "near", wrong=[0, 1, 2, 3])
    result = compare(good, near)
    assert "do not tell" in result["verdict"]
    assert str(good) not in result["verdict"]


def test_a_p_value_too_small_for_digits(good, tmp_path):
    assert "p < 1e-6" in compare(good, make_run(tmp_path / "bad", wrong=range(2, 100)))["verdict"]


def test_two_seeds_of_one_config_are_told(tmp_path):
    runs = [
        make_run(tmp_path / str(seed), range(20 * seed), summary={"steps": 9, "identity": {"seed": seed, "a": 1}})
        for seed in (0, 1)
    ]
    assert compare(*runs)["verdict"].endswith("the same but for the seed, so it was the luckier seed.")
    again = make_run(tmp_path / "again", range(40), summary={"steps": 9, "identity": {"seed": 0, "a": 1}})
    assert "luckier" not in compare(runs[0], again)["verdict"]
    longer = make_run(tmp_path / "2", range(20), summary={"steps": 10, "identity": {"seed": 1, "a": 1}})
    assert compare(runs[0], longer)["verdict"].endswith("takes several seeds of each.")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"summary": {"eval_precision": "bfloat16"}}, r"precision of evaluation \(float32 against bfloat16\)"),
        ({"summary": {"precision": "bfloat16"}}, r"precision \(float32 against bfloat16\)"),
        ({"split": "last:5000"}, r"split \('first:5000' against 'last:5000'\)"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_differs_beside_the_config_may_be_the_cause(tmp_path, changes, said, seed):
    def made(name, wrong, seed, summary=None, **facts):
        at = {"precision": "float32", "eval_precision": "float32", "identity": {"seed": seed}}
        return make_run(tmp_path / name, wrong, summary={**at, **(summary or {})}, **facts)

    result = compare(made("a", [], 0), made("b", range(20), seed, **changes))
    same = "the same" if seed == 0 else "the same but for the seed"
    assert re.search(rf"their configs are {same}, but they differ in {said}\.$", result["verdict"])
    (warning,) = result["warnings"]
    assert re.search(said, warning)


def test_text_is_aligned_and_says_it_all(good, poor):
    text = texts.comparison(compare(good, poor))
    lines = text.splitlines()
    first, second = (lines.index(f"{name:<19}{folder}") for name, folder in (("first", good), ("second", poor)))
    assert lines[first + 1].split()[-1] == "98.00%"
    assert lines[second + 1].split()[-1] == "89.00%"
    counts = [line.split()[2:] for line in lines if line.startswith(("first right", "first wrong"))]
    assert [counts[0][1], counts[1][0]] == ["10", "1"], "by the first only, by the second only"
    assert "is the better" in text
    assert "WARNING" not in text


def test_other_data_are_refused_with_both_named(good, tmp_path):
    other = make_run(tmp_path / "other", name="fashion_mnist", content_hash="02effb3111fd" + "0" * 52)
    with pytest.raises(UsageError, match=r"data sets differ.*mnist.*f7151d6e42dc.*fashion_mnist.*02effb3111fd"):
        compare(good, other)


@pytest.mark.parametrize("labels", [LABELS[::-1].copy(), LABELS[:50]])
def test_other_labels_are_refused_whatever_the_hash_says(good, tmp_path, labels):
    with pytest.raises(UsageError, match="not measured on the same test images, their labels"):
        compare(good, make_run(tmp_path / "other", labels=labels))


def test_selection_on_test_images_is_said_of_the_run_that_did_it(good, tmp_path):
    cheat = make_run(tmp_path / "cheat", summary={"selected_on": "test:128"}, selection="test:128")
    warnings = compare(good, cheat)["warnings"]
    chosen = [warning for warning in warnings if "chosen on test images" in warning]
    assert len(chosen) == 1
    assert "cheat" in chosen[0]
    assert "test:128" in chosen[0]
    assert [w for w in warnings if "selection ('validation' against 'test:128')" in w]
    assert f"WARNING: {chosen[0]}" in texts.comparison(compare(good, cheat))


@pytest.mark.parametrize(
    ("facts", "said", "unsaid"),
    [
        ({"split": "last:10000"}, "split ('first:5000' against 'last:10000')", "scaling"),
        ({"protocol": "s4", "scaling": "signed"}, "protocol ('seqmnist' against 's4'), scaling", "view"),
        ({"view": "pixel"}, "view ('row' against 'pixel')", "split"),
        (
            {"permutation": "numpy:1", "permutation_indices": [2, 0, 1]},
            "permutation ('none' against 'numpy:1').",
            "indices",
        ),
        ({"permutation_indices": [2, 0, 1]}, "permutation_indices.", "[2"),
    ],
)
def test_what_differs_in_the_task_is_named(good, tmp_path, facts, said, unsaid):
    (warning,) = compare(good, make_run(tmp_path / "other", **facts))["warnings"]
    assert said in warning
    assert unsaid not in warning


def test_the_data_sets_own_warning_is_said_once(tmp_path):
    a, b = (make_run(tmp_path / name, warning="NOT on MNIST") for name in "ab")
    assert compare(a, b)["warnings"] == ["NOT on MNIST"]


def test_a_run_of_an_earlier_version_has_no_protocol_to_differ(good, poor):
    facts = json.loads((poor / "data.json").read_text())
    del facts["protocol"]
    write_json(poor / "data.json", facts)
    assert compare(good, poor)["warnings"] == []


def test_a_run_against_itself_is_noticed(good):
    result = compare(good, good.parent / "." / "good")
    assert result["mcnemar"]["p_value"] == 1.0
    assert "itself" in result["warnings"][0]


def test_no_work_directory(good, tmp_path):
    with pytest.raises(WorkdirError, match="expected a work directory"):
        compare(good, tmp_path / "nowhere")


def test_an_unfinished_run_is_refused_with_how_to_finish_it(good, poor):
    for name in ("summary.json", "predictions.npz"):
        (poor / name).unlink()
    with pytest.raises(WorkdirError, match=r"poor is not finished: .*command that trained it again.*--workdir=.*poor"):
        compare(good, poor)


def test_who_has_no_answers_is_told_why(good, poor):
    (poor / "predictions.npz").unlink()
    with pytest.raises(WorkdirError, match="poor is a trial"):
        compare(good, poor)
    (poor / "diverged.json").write_text("{}")
    with pytest.raises(WorkdirError, match="poor diverged"):
        compare(good, poor)


def test_a_summary_without_predictions_has_to_go_first(good, tmp_path):
    poor = make_run(tmp_path / "poor", summary={"test_accuracy": 1.0})
    (poor / "predictions.npz").unlink()
    with pytest.raises(WorkdirError, match=r"not finished: it has no predictions\.npz\. .*remove its summary\.json"):
        compare(good, poor)


def test_predictions_without_a_summary_are_not_finished(good, poor):
    """As a run leaves them that is killed between the two."""
    (poor / "summary.json").unlink()
    with pytest.raises(WorkdirError, match=r"has no summary\.json\. To finish it, give"):
        compare(good, poor)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def _flip(path):
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("logits.npy")
    content = bytearray(path.read_bytes())
    middle = entry.header_offset + 60 + entry.compress_size // 2
    content[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(content)


def _pickle(path):
    np.savez(path, labels=LABELS, predictions=LABELS, logits=np.array([{}], dtype=object))


def _one_array(path):
    with path.open("wb") as file:
        np.save(file, LABELS)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "no archive": lambda path: path.write_text("hello"),
    "cut": _cut,
    "flipped": _flip,
    "pickled": _pickle,
    "one array": _one_array,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "without logits": lambda path: np.savez(path, labels=LABELS, predictions=LABELS),
    "wrong shape": lambda path: np.savez(path, labels=LABELS, predictions=LABELS, logits=np.zeros((99, 10))),
    "NaN": lambda path: np.savez(path, labels=LABELS, predictions=LABELS, logits=np.full((100, 10), np.nan)),
    "label out of range": lambda path: np.savez(path, labels=LABELS + 1, predictions=LABELS, logits=np.eye(10)[LABELS]),
    "other predictions": lambda path: np.savez(path, labels=LABELS, predictions=LABELS, logits=np.zeros((100, 10))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_predictions_give_one_clear_error(good, poor, damage):
    damage(poor / "predictions.npz")
    with pytest.raises(WorkdirError, match=r"poor/predictions\.npz is damaged .*To make it anew") as caught:
        compare(good, poor)
    assert "\n" not in str(caught.value)


def test_a_damaged_summary_gives_one_clear_error(good, poor):
    (poor / "summary.json").write_text('{"selected_on": "vali')
    with pytest.raises(WorkdirError, match=r"summary\.json can't be read as JSON"):
        compare(good, poor)


def test_comparing_leaves_the_folders_as_they_were(good, poor, tmp_path):
    shutil.copytree(poor, tmp_path / "before")
    compare(good, poor)
    assert sorted(path.name for path in poor.iterdir()) == sorted(path.name for path in (tmp_path / "before").iterdir())
    for path in poor.iterdir():
        assert path.read_bytes() == (tmp_path / "before" / path.name).read_bytes()
