import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import assert_equal, weights
from transformers import TrainerCallback, TrainerControl, TrainerState

from pipeline.averaging import LIVE, WeightAverage
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.training import prepare, train

STEPS = ["--eval_strategy=steps", "--eval_steps=5", "--save_strategy=steps", "--save_steps=5"]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (1 / 2, (1 + 2 + 6) / 3),  # the plain mean
        (1 / 3, (1 * 1 + 2 * 2 + 3 * 6) / (1 + 2 + 3)),  # step t weighs t
    ],
)
def test_the_average_is_the_one_on_paper(width, expected):
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, width)
    for step, value in enumerate((1.0, 2.0, 6.0), start=1):
        torch.nn.init.constant_(model.weight, value)
        average.on_step_end(None, TrainerState(global_step=step), TrainerControl())
    assert model.weight.item() == 6
    with average.in_place():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 6


def test_what_is_scored_and_left_is_the_mean_of_all_steps(tiny_recipe):
    seen = []

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append({name: t.clone() for name, t in model.state_dict().items()})

    options = ["--weight_average=0.5", "--max_steps=10", *STEPS, "--load_best_model_at_end=false"]
    trainer = prepare(load_recipe(tiny_recipe, options, "run"))
    trainer.add_callback(Follow())
    trainer.train()
    assert len(seen) == 10
    for name, tensor in trainer.model.state_dict().items():
        mean = torch.stack([step[name] for step in seen]).mean(0)
        torch.testing.assert_close(tensor, mean, atol=1e-6, rtol=1e-4)
    scored = [entry["eval_nll"] for entry in trainer.state.log_history if "eval_nll" in entry]
    assert trainer.evaluate()["eval_nll"] == scored[-1]


def test_a_resumed_run_ends_with_the_same_average(tiny_recipe):
    options = ["--weight_average=0.2", "--num_train_epochs=2", *STEPS]
    train(load_recipe(tiny_recipe, options, "run"))
    model, checkpoints = Path("models/run"), Path("models/checkpoints/run")
    whole, last = weights(model), checkpoints / "checkpoint-44"
    assert not torch.equal(
        weights(last)["classifier.weight"], load_file(last / LIVE)["classifier.weight"]
    )
    shutil.rmtree(model)
    shutil.rmtree(last)  # as if it had been killed before
    assert train(load_recipe(tiny_recipe, options, "run"))["steps"] == 44
    assert_equal(weights(model), whole)


def test_a_width_that_is_no_share_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="weight_average is 0.9; it is a share of the steps"):
        load_recipe(tiny_recipe, ["--weight_average=0.9"])
