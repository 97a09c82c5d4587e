import numpy as np
import pytest
from sklearn.metrics import f1_score

from pipeline.evaluation.metrics import ImageClassification, calibration_error, wilson_interval

# Four images of three classes; the third is wrong: class 1 taken for class 0.
PROBABILITIES = np.array([[0.8, 0.1, 0.1], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
LABELS = np.array([0, 1, 1, 2])


@pytest.fixture
def scores() -> dict:
    metric = ImageClassification(keep_in_memory=True)
    return metric.compute(predictions=np.log(PROBABILITIES), references=LABELS)


def test_a_hand_worked_confusion_matrix(scores):
    assert scores["confusion_matrix"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert scores["accuracy"] == 0.75
    assert scores["precision"] == [0.5, 1, 1]
    assert scores["recall"] == [1, 0.5, 1]
    assert scores["support"] == [1, 2, 1]
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_nll_is_the_mean_log_probability_of_the_truth(scores):
    expected = -(np.log(0.8) + np.log(0.5) + np.log(0.25) + np.log(0.8)) / 4
    assert scores["nll"] == pytest.approx(expected, abs=1e-6)


def test_ece_is_the_gap_between_confidence_and_accuracy(scores):
    # Two bins: at 0.8 both right (gap 0.2), at 0.5 half right (gap 0). Weights 2/4 each.
    assert scores["ece"] == pytest.approx(0.5 * 0.2, abs=1e-6)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
)
def test_wilson_interval_gives_newcombes_published_values(correct, total, low, high):
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I.
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_batches_added_one_by_one_give_the_same(scores):
    metric = ImageClassification(keep_in_memory=True)
    for rows in ([0, 1, 2], [3]):
        metric.add_batch(predictions=np.log(PROBABILITIES[rows]), references=LABELS[rows])
    assert metric.compute() == scores


def test_macro_f1_leaves_out_classes_that_neither_occur_nor_are_predicted():
    metric = ImageClassification(keep_in_memory=True)
    for predicted, labels in (([0, 1], [0, 1]), ([0, 1, 3], [0, 1, 1])):
        scores = metric.compute(predictions=np.eye(10)[predicted], references=labels)
        assert scores["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
        assert len(scores["f1"]) == 10


def test_a_class_never_predicted_has_precision_zero():
    metric = ImageClassification(keep_in_memory=True)
    scores = metric.compute(predictions=[[2.0, 1.0], [2.0, 1.0]], references=[0, 1])
    assert scores["precision"] == [0.5, 0]
    assert scores["recall"] == [1, 0]
