from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.explain.faithfulness import STEPS, _curve, auc, summarize


class FirstPatch(torch.nn.Module):
    """Says class 1 with 0.982 where the upper left patch is bright, else 0.5."""

    def forward(self, pixels):
        bright = pixels[:, :, :4, :4].mean(dim=(1, 2, 3))
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(bright), 4 * bright], dim=1))


@pytest.fixture
def curve():
    pixels, classes = torch.ones(2, 3, 8, 8), torch.ones(2, dtype=torch.long)

    def measure(order: list[list[float]], insertion: bool) -> np.ndarray:
        values = torch.tensor(order).expand(2, 2, 2)
        return _curve(FirstPatch(), pixels, classes, values, insertion).numpy()

    return measure


RIGHT, WRONG = [[4.0, 3], [2, 1]], [[1.0, 2], [3, 4]]
HIGH, LOW = 1 / (1 + np.exp(-4)), 0.5


def test_deletion_falls_at_once_in_the_right_order_and_last_in_the_wrong_one(curve):
    # Patches gone at the nine points: 0 0 1 2 2 2 3 4 4.
    right, wrong = curve(RIGHT, False), curve(WRONG, False)
    assert right.shape == (2, STEPS)
    np.testing.assert_allclose(right[0], [HIGH] * 2 + [LOW] * 7, rtol=1e-5)
    np.testing.assert_allclose(wrong[1], [HIGH] * 7 + [LOW] * 2, rtol=1e-5)


def test_insertion_rises_at_once_in_the_right_order(curve):
    np.testing.assert_allclose(curve(RIGHT, True)[0], [LOW] * 2 + [HIGH] * 7, rtol=1e-5)
    np.testing.assert_allclose(curve(WRONG, True)[0], [LOW] * 7 + [HIGH] * 2, rtol=1e-5)


def test_area_of_a_straight_line():
    assert auc(np.linspace(1, 0, STEPS)[None])[0] == pytest.approx(0.5)
    assert auc(np.ones((3, STEPS))) == pytest.approx(np.ones(3))


def test_a_method_beats_random_only_where_its_interval_says_so():
    random = np.random.default_rng(0).random(300)
    noise = np.random.default_rng(1).normal(0, 0.3, 300)
    summary = summarize(
        {
            "random": {"deletion": random, "insertion": random},
            "good": {"deletion": random - 0.1, "insertion": random + 0.1},
            "bad": {"deletion": random + 0.1, "insertion": random - 0.1},
            "noisy": {"deletion": random + noise - noise.mean(), "insertion": random},
        }
    )
    for kind in ("deletion", "insertion"):
        good, bad = summary["good"][kind], summary["bad"][kind]
        assert good["gain_over_random"] == pytest.approx(0.1)
        assert good["gain_interval"] == pytest.approx([0.1, 0.1])
        assert good["beats_random"]
        assert bad["gain_over_random"] == pytest.approx(-0.1)
        assert not bad["beats_random"]
    assert not summary["noisy"]["deletion"]["beats_random"]
    low, high = summary["noisy"]["deletion"]["gain_interval"]
    # The bootstrap of a mean: about 1.96 standard errors each way.
    assert high - low == pytest.approx(2 * 1.96 * 0.3 / 300**0.5, rel=0.15)
