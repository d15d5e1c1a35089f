"""What a result on a test set says, and how surely, in float64.

Pure functions of NumPy arrays; what they return are JSON values. A training's own result needs no SciPy, whose
import takes as long as some runs.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Json = dict[str, Any]

CONFIDENCE = 0.95
CALIBRATION_BINS = 15  # as in Guo et al. 2017


def score(logits: npt.ArrayLike, labels: npt.ArrayLike) -> Json:
    """How well a model's logits predict the labels.

    Args:
      logits: float [count, classes], finite, of any scale that `softmax` takes.
      labels: integers [count], 0 to classes - 1.

    Returns:
      count: the number of examples.
      accuracy: the fraction whose largest logit is the label's (of equal ones the first, as ``numpy.argmax``).
      accuracy_interval: [low, high], 95 %, Wilson's score interval (Wilson 1927, "Probable inference, the
        law of succession, and statistical inference", JASA 22). It covers the choice of test examples, not
        that of the seed; for that see `over_seeds`.
      loss: the mean negative log likelihood, in nats.
      calibration_error: the expected calibration error over 15 bins of equal width, (0, 1/15] to (14/15, 1],
        of the probability given to the predicted class (Guo et al. 2017, "On calibration of modern neural
        networks", ICML, equation 3).
      calibration_bins: of each bin low, high, count, and the mean confidence and accuracy, None where it is empty.
      confusion: counts [true class][predicted class].
      per_class: of each class its count and accuracy, None where no example has it.

    Raises:
      ValueError: wrong shapes, a logit that is not finite, or a label that is no class.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits has shape {logits.shape}; expected [count, classes], neither of them 0")
    count, classes = logits.shape
    labels = _classes("labels", labels, count, classes)
    logits = logits.astype(np.float64)
    bad = count - int(np.isfinite(logits).all(-1).sum())
    if bad:
        raise ValueError(f"logits has {bad:,} of {count:,} rows with NaN or infinity; expected finite numbers")

    predictions = logits.argmax(-1)
    right = predictions == labels
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    calibration_error, bins = _calibration(np.exp(log_probabilities.max(-1)), right)
    confusion = np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)
    return {
        "count": count,
        "accuracy": float(right.mean()),
        "accuracy_interval": _wilson(int(right.sum()), count),
        # 0.0 - ...: a loss of nothing is 0, not -0.
        "loss": float(0.0 - log_probabilities[np.arange(count), labels].mean()),
        "calibration_error": calibration_error,
        "calibration_bins": bins,
        "confusion": confusion.tolist(),
        "per_class": [
            {"count": int(row.sum()), "accuracy": _ratio(row[true], row.sum())} for true, row in enumerate(confusion)
        ],
    }


def over_seeds(values: Sequence[float] | npt.ArrayLike) -> Json:
    """What runs that differ in their seed alone have in common.

    Args:
      values: shares [n], 0 to 1, one of each run, as its test accuracy.

    Returns:
      n, mean, min and max; std, the sample's standard deviation (n - 1 in the denominator); interval,
      [low, high] of the mean, 95 %, by Student's t with n - 1 degrees of freedom, cut at 0 and 1. The last two are None
      for a single run, which says nothing of its spread.

    Raises:
      ValueError: no values, another shape, or one that is not finite.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"values has shape {numbers.shape}; expected [n] with at least one")
    if not np.isfinite(numbers).all():
        raise ValueError(f"values holds NaN or infinity: {numbers.tolist()}; expected finite numbers")
    mean = float(numbers.mean())
    std = interval = None
    if len(numbers) > 1:
        import scipy.stats

        std = float(numbers.std(ddof=1))
        error = scipy.stats.sem(numbers)
        # SciPy has no interval of width 0 and gives NaN.
        ends = scipy.stats.t.interval(CONFIDENCE, len(numbers) - 1, loc=mean, scale=error) if error else (mean, mean)
        interval = [min(max(float(end), 0.0), 1.0) for end in ends]
    return {
        "n": len(numbers),
        "mean": mean,
        "std": std,
        "interval": interval,
        "min": float(numbers.min()),
        "max": float(numbers.max()),
    }


def in_percent(mean: float | None, std: float | None, interval: Sequence[float] | None = None) -> str:
    """A mean over seeds for people, as '98.40 ± 0.15 (98.22 to 98.59)', or '-' where there is none."""
    if mean is None:
        return "-"
    spread = "" if std is None else f" ± {100 * std:.2f}"
    bounds = "" if interval is None else f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"
    return f"{100 * mean:.2f}{spread}{bounds}"


def mcnemar(labels: npt.ArrayLike, a: npt.ArrayLike, b: npt.ArrayLike) -> Json:
    """Whether two models' accuracies on the same examples differ by more than chance.

    Only the examples that exactly one of them has right tell; were the two equally good, each would fall to
    either as a fair coin does (McNemar 1947, "Note on the sampling error of the difference between correlated
    proportions or percentages", Psychometrika 12). The test is the exact binomial one, by ``scipy.stats``.

    Args:
      labels: integers [count], the true classes.
      a: integers [count], the classes that the first model predicts.
      b: integers [count], those of the second.

    Returns:
      both, only_a, only_b, neither: how many examples which model has right; p_value: two-sided, 1.0 where
      no example tells; accuracy_difference: that of a less that of b.

    Raises:
      ValueError: wrong shapes, no examples, or no integers from 0.
    """
    shape = np.shape(labels)
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"labels has shape {shape}; expected [count] with at least one")
    import scipy.stats

    labels, a, b = (_classes(name, array, *shape) for name, array in (("labels", labels), ("a", a), ("b", b)))
    right_a, right_b = a == labels, b == labels
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    telling = only_a + only_b
    return {
        "both": int((right_a & right_b).sum()),
        "only_a": only_a,
        "only_b": only_b,
        "neither": int((~right_a & ~right_b).sum()),
        "p_value": float(scipy.stats.binomtest(only_a, telling, 0.5).pvalue) if telling else 1.0,
        "accuracy_difference": (only_a - only_b) / shape[0],
    }


def _classes(name: str, array: npt.ArrayLike, count: int, classes: int | None = None) -> np.ndarray:
    """The array as int64 [count], found to hold classes: 0 or more, and below `classes` where that is known."""
    array = np.asarray(array)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; expected integers [{count}]")
    if array.min() < 0 or (classes is not None and array.max() >= classes):
        expected = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise ValueError(f"{name} holds {array.min()} to {array.max()}; expected {expected}")
    return array.astype(np.int64)


def _wilson(right: int, count: int) -> list[float]:
    """Where the true share lies, of which `right` of `count` would be at the edge of 95 %."""
    share, z = right / count, statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _calibration(confidence: np.ndarray, right: np.ndarray) -> tuple[float, list[Json]]:
    """The expected calibration error, and the bins that it sums over."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    # A bin has its upper edge, not its lower.
    bins = np.searchsorted(edges[1:-1], confidence, side="left")
    counts, confidences, rights = (
        np.bincount(bins, weights, minlength=CALIBRATION_BINS) for weights in (None, confidence, right)
    )
    error = float(np.abs(rights - confidences).sum() / len(confidence))
    return error, [
        {
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "count": int(counts[i]),
            "confidence": _ratio(confidences[i], counts[i]),
            "accuracy": _ratio(rights[i], counts[i]),
        }
        for i in range(CALIBRATION_BINS)
    ]


def _ratio(part: float, whole: int) -> float | None:
    return float(part / whole) if whole else None
