"""Statistics of a result, against published numbers, tables and sums done by hand."""

import json
import math

import numpy as np
import pytest

from seqmnist_jax.training.scores import mcnemar, over_seeds, score


def logits_with(right, count):
    """Logits of two classes for labels of zeros, of which so many are right."""
    logits = np.zeros((count, 2), np.float32)
    logits[:right, 0] = 1
    logits[right:, 1] = 1
    return logits


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_accuracy_interval_is_the_published_one(right, count, low, high):
    result = score(logits_with(right, count), np.zeros(count, int))
    assert (result["count"], result["accuracy"]) == (count, right / count)
    assert result["accuracy_interval"] == pytest.approx([low, high], abs=5e-5)


def test_accuracy_interval_is_wilsons_formula_on_a_test_set_of_mnists_size():
    n, p, z = 10_000, 0.9688, 1.959963984540054
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
    assert score(logits_with(9688, n), np.zeros(n, np.uint8))["accuracy_interval"] == pytest.approx(expected, abs=1e-12)


def test_nothing_wrong_has_no_interval_of_width_0():
    assert score(logits_with(20, 20), np.zeros(20, int))["accuracy_interval"] == pytest.approx([0.8389, 1.0], abs=5e-5)


def test_loss_is_the_mean_of_minus_log_p():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    shift = np.array([[100.0], [-7.0]])  # which a softmax does not see
    result = score(np.log(probabilities) + shift, [0, 1])
    assert result["loss"] == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2)


def test_loss_of_huge_logits_is_finite():
    assert score(np.array([[1e4, -1e4]], np.float32), [1])["loss"] == 2e4
    assert math.copysign(1, score(np.array([[1e4, -1e4]], np.float32), [0])["loss"]) == 1


def test_loss_is_summed_in_float64():
    """In float32 this would be off from the seventh digit on."""
    logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float16)
    expected = np.mean([-math.log(math.exp(row[1]) / sum(map(math.exp, row))) for row in logits.astype(float).tolist()])
    assert score(logits, [1, 1, 1])["loss"] == pytest.approx(expected, rel=1e-14)


def test_calibration_error_of_a_constructed_case():
    """Ten examples at confidence 0.9 of which 7 are right, five at 0.62 of which 4 are, five at 0.3 of which 1 is.

    The gaps are 0.2, 0.18 and 0.1, their weights 1/2, 1/4 and 1/4: 0.1 + 0.045 + 0.025.
    """
    rows = [(0.9, i < 7) for i in range(10)] + [(0.62, i < 4) for i in range(5)] + [(0.3, i < 1) for i in range(5)]
    probabilities = np.array([[confidence, *[(1 - confidence) / 4] * 4] for confidence, _ in rows])
    result = score(np.log(probabilities), [0 if right else 3 for _, right in rows])
    assert result["calibration_error"] == pytest.approx(0.17)
    bins = result["calibration_bins"]
    assert len(bins) == 15
    full = {i: one for i, one in enumerate(bins) if one["count"]}
    assert {i: one["count"] for i, one in full.items()} == {4: 5, 9: 5, 13: 10}  # 0.9 is 13.5 fifteenths
    assert [one["confidence"] for one in full.values()] == pytest.approx([0.3, 0.62, 0.9])
    assert [one["accuracy"] for one in full.values()] == pytest.approx([0.2, 0.8, 0.7])
    assert bins[0] == {"low": 0.0, "high": pytest.approx(1 / 15), "count": 0, "confidence": None, "accuracy": None}
    assert bins[14]["high"] == 1.0


def test_certain_answers_are_in_the_last_bin():
    result = score(np.array([[1000.0, 0.0], [1000.0, 0.0]]), [0, 1])
    assert (result["calibration_bins"][14]["count"], result["calibration_error"]) == (2, 0.5)


def test_confusion_is_true_by_predicted_and_absent_classes_have_no_accuracy():
    labels = np.array([0, 0, 0, 2, 2], np.uint8)
    logits = np.eye(4)[[0, 1, 0, 2, 0]]
    result = score(logits, labels)
    assert result["confusion"] == [[2, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert [one["count"] for one in result["per_class"]] == [3, 0, 2, 0]
    assert [one["accuracy"] for one in result["per_class"]] == [pytest.approx(2 / 3), None, 0.5, None]


def test_small_integer_labels_do_not_overflow_with_many_classes():
    result = score(np.eye(47)[[46, 40]], np.array([46, 40], np.uint8))
    assert result["accuracy"] == 1.0
    assert (result["confusion"][46][46], result["confusion"][40][40]) == (1, 1)


def test_of_equal_logits_the_first_is_the_prediction():
    assert score(np.zeros((4, 3)), [0, 1, 2, 0])["accuracy"] == 0.5


def test_a_score_is_json():
    result = score(np.eye(3)[[0, 1]], [0, 0])
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros(3), [0], r"logits has shape \(3,\); expected \[count, classes\]"),
        (np.zeros((0, 3)), np.zeros(0, int), r"\(0, 3\)"),
        (np.zeros((2, 3)), [0], r"labels is int64 \[1\]; expected integers \[2\]"),
        (np.zeros((2, 3)), [[0, 1]], r"\[1, 2\]; expected integers \[2\]"),
        (np.zeros((2, 3)), [0.0, 1.0], "float64"),
        (np.zeros((2, 3)), [0, 3], "0 to 3; expected 0 to 2"),
        (np.zeros((2, 3)), [-1, 0], "-1 to 0; expected 0 to 2"),
        (np.array([[0, np.nan], [0, 1]]), [0, 1], "1 of 2 rows with NaN"),
        (np.array([[0, np.inf], [np.nan, 1]]), [0, 1], "2 of 2 rows"),
    ],
)
def test_bad_scores_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        score(logits, labels)


def test_over_seeds_has_students_interval():
    """t = 2.776 at 4 degrees of freedom, two-sided 95 %, in any table."""
    result = over_seeds([0.961, 0.967, 0.958, 0.972, 0.962])
    assert (result["n"], result["min"], result["max"]) == (5, 0.958, 0.972)
    assert result["mean"] == pytest.approx(0.964)
    std = math.sqrt(sum((x - 0.964) ** 2 for x in (0.961, 0.967, 0.958, 0.972, 0.962)) / 4)
    assert result["std"] == pytest.approx(std)
    scale = std / math.sqrt(5)
    assert result["interval"] == pytest.approx([0.964 - 2.776 * scale, 0.964 + 2.776 * scale], abs=5e-4 * scale)


def test_an_interval_of_shares_ends_at_0_and_1():
    assert over_seeds([0.01, 0.9])["interval"] == [0.0, 1.0]


def test_one_seed_has_no_spread():
    assert over_seeds([0.9]) == {"n": 1, "mean": 0.9, "std": None, "interval": None, "min": 0.9, "max": 0.9}


def test_equal_values_have_an_interval_of_width_0():
    result = over_seeds(np.full(3, 0.5))
    assert (result["std"], result["interval"]) == (0.0, [0.5, 0.5])
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("values", [[], [[0.9, 0.8]], 0.9, [0.9, math.nan], [math.inf]])
def test_bad_values_are_refused(values):
    with pytest.raises(ValueError, match="values"):
        over_seeds(values)


def answers(both, only_a, only_b, neither):
    """Labels, and the predictions of two models of which so many are right."""
    right_a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    right_b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    labels = np.full(len(right_a), 3, np.uint8)
    return labels, np.where(right_a, 3, 5).astype(np.uint8), np.where(right_b, 3, 7).astype(np.int32)


@pytest.mark.parametrize(("only_a", "only_b"), [(1, 5), (5, 1), (9, 30), (4, 4)])
def test_mcnemar_is_the_binomial_sum(only_a, only_b):
    n, fewer = only_a + only_b, min(only_a, only_b)
    expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)  # 1 of 6: 14/64
    result = mcnemar(*answers(40, only_a, only_b, 7))
    assert result["p_value"] == pytest.approx(expected)
    assert {name: result[name] for name in ("both", "only_a", "only_b", "neither")} == {
        "both": 40,
        "only_a": only_a,
        "only_b": only_b,
        "neither": 7,
    }
    assert result["accuracy_difference"] == pytest.approx((only_a - only_b) / (47 + n))


def test_two_wrong_answers_are_no_agreement_in_being_right():
    assert mcnemar([0, 0], [1, 1], [2, 1])["neither"] == 2


@pytest.mark.parametrize("both", [0, 5])
def test_without_an_example_that_tells_p_is_1(both):
    result = mcnemar(*answers(both, 0, 0, 2))
    assert (result["p_value"], result["accuracy_difference"]) == (1.0, 0.0)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("labels", "a", "b", "message"),
    [
        ([], [], [], r"labels has shape \(0,\)"),
        ([[0]], [0], [0], r"labels has shape \(1, 1\)"),
        ([0, 1], [0], [0, 1], r"a is int64 \[1\]; expected integers \[2\]"),
        ([0, 1], [0, 1], [0.0, 1.0], "b is float64"),
        ([0, 1], [0, 1], [0, -1], "b holds -1 to 0; expected 0 or more"),
    ],
)
def test_bad_answers_are_refused(labels, a, b, message):
    with pytest.raises(ValueError, match=message):
        mcnemar(labels, a, b)
