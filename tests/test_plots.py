import numpy as np
from PIL import Image

from pipeline import plots


def colors(path) -> int:
    with Image.open(path) as image:
        return len(image.convert("L").getcolors(256))


def test_a_matrix_of_many_classes_is_drawn_as_its_most_confused_pairs(tmp_path):
    counts = np.eye(1000, dtype=int) * 10
    counts[3, 5] = 4
    plots.confusion_matrix(counts.tolist(), [f"class {i}" for i in range(1000)], tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as image:
        assert max(image.size) < 2000
    assert (tmp_path / "m.png").stat().st_size < 300_000


def test_dollar_signs_in_class_names_are_drawn_as_they_are(tmp_path):
    labels = ["$5 bill", "$\\frac{", "a_b^c"]
    plots.confusion_matrix(np.eye(3, dtype=int).tolist(), labels, tmp_path / "m.png")
    assert colors(tmp_path / "m.png") > 20


def test_training_curves_need_no_validation_and_no_log(tmp_path):
    log = [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "loss": 1.0}]
    assert plots.training_curves(log, tmp_path / "curves.png")
    assert colors(tmp_path / "curves.png") > 20
    assert not plots.training_curves([], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
