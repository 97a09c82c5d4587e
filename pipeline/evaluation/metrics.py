"""One `evaluate.Metric` for image classification, computed here: nothing is fetched.

- Wilson interval: Wilson 1927, "Probable inference, the law of succession, and statistical
  inference".
- Expected calibration error: Guo et al. 2017, arXiv:1706.04599, 15 bins of equal width.
"""

import datasets
import evaluate
import numpy as np

ECE_BINS = 15
Z_95 = 1.959964  # the normal distribution's 97.5 % point


class ImageClassification(evaluate.Metric):
    """Predictions are logits (N, C), references are class numbers (N,).

    `compute` gives accuracy with its 95 % Wilson interval, macro_f1, nll (natural log, per
    image), ece, and per class precision, recall, f1 and support, each (C,), with the
    confusion_matrix (C, C): rows true, columns predicted.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=self.__class__.__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references) -> dict:
        return scores(np.asarray(predictions), np.asarray(references))


def scores(logits: np.ndarray, labels: np.ndarray) -> dict:
    """See `ImageClassification`."""
    logits = logits.astype(np.float64)
    classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    log_probabilities = logits - _log_sum_exp(logits)[:, None]  # (N, C)
    correct = predicted == labels
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    hits = np.diag(matrix)
    precision = _ratio(hits, matrix.sum(axis=0))
    recall = _ratio(hits, matrix.sum(axis=1))
    f1 = _ratio(2 * hits, matrix.sum(axis=0) + matrix.sum(axis=1))
    return {
        "accuracy": float(correct.mean()),
        "accuracy_interval": list(wilson_interval(int(correct.sum()), len(labels))),
        "macro_f1": float(f1.mean()),
        "nll": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "ece": calibration_error(np.exp(log_probabilities.max(axis=1)), correct),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": f1.tolist(),
        "support": matrix.sum(axis=1).tolist(),
        "confusion_matrix": matrix.tolist(),
    }


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, right also near 0 and 1."""
    share = correct / total
    spread = Z_95 * np.sqrt(share * (1 - share) / total + (Z_95 / (2 * total)) ** 2)
    center = share + Z_95**2 / (2 * total)
    scale = 1 + Z_95**2 / total
    return max(0.0, float((center - spread) / scale)), min(1.0, float((center + spread) / scale))


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The gap between confidence (N,) and accuracy, averaged over bins by their size."""
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def _log_sum_exp(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=1, keepdims=True)
    return (top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True)))[:, 0]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where the whole is 0, as scikit-learn's scores do."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
