"""An `evaluate.Metric` for image classification that needs no download.

- Wilson interval: Wilson 1927, "Probable inference, the law of succession, and statistical
  inference".
- Expected calibration error: Guo et al. 2017, arXiv:1706.04599, 15 bins of equal width.
"""

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

ECE_BINS = 15


class ImageClassification(evaluate.Metric):
    """Predictions are logits (N, C), references are class numbers (N,).

    `compute` returns accuracy with its 95 % Wilson interval, balanced_accuracy (the mean recall of
    the classes that occur), macro_f1 (the mean of the classes that occur or are predicted), nll
    (natural log, per image), ece, and per class precision, recall, f1 and support, each (C,), and
    the confusion_matrix (C, C), with true classes in rows and predicted ones in columns.
    """

    def _info(self) -> evaluate.MetricInfo:
        logits, label = datasets.List(datasets.Value("float32")), datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=self.__class__.__doc__,
            features=datasets.Features({"predictions": logits, "references": label}),
        )

    def _compute(self, predictions, references) -> dict:
        logits, labels = np.asarray(predictions, np.float64), np.asarray(references)
        classes = range(logits.shape[1])
        predicted = logits.argmax(axis=1)
        log_probs = log_softmax(logits, axis=1)  # (N, C)
        correct = predicted == labels
        precision, recall, f1, support = precision_recall_fscore_support(
            labels, predicted, labels=classes, zero_division=0
        )
        return {
            "accuracy": float(correct.mean()),
            "accuracy_interval": wilson_interval(int(correct.sum()), len(labels)),
            "balanced_accuracy": float(recall[support > 0].mean()),
            "macro_f1": float(f1[np.union1d(labels, predicted)].mean()),
            "nll": float(-log_probs[np.arange(len(labels)), labels].mean()),
            "ece": calibration_error(np.exp(log_probs.max(axis=1)), correct),
            "precision": precision.tolist(),
            "recall": recall.tolist(),
            "f1": f1.tolist(),
            "support": support.tolist(),
            "confusion_matrix": confusion_matrix(labels, predicted, labels=classes).tolist(),
        }


def wilson_interval(correct: int, total: int) -> list[float]:
    """Return the 95 % interval of a proportion, which is also valid near 0 and 1."""
    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the gap between confidence (N,) and accuracy, averaged over bins weighted by size."""
    counts, confidences, accuracies = reliability(confidence, correct)
    return float((counts * np.abs(accuracies - confidences)).sum() / len(confidence))


def reliability(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return size, mean confidence and accuracy for each bin of confidence (N,): (3, ECE_BINS)."""
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    weights = (np.ones(len(bins)), confidence, correct)
    counts, *sums = (np.bincount(bins, weights=w, minlength=ECE_BINS) for w in weights)
    return np.stack([counts, *(total / np.maximum(counts, 1) for total in sums)])
