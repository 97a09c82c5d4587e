import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

import train_vit
from launching import two_processes
from pipeline.data.loading import load_splits
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.metrics import wilson_interval
from pipeline.recipe import load_recipe, load_settings
from pipeline.training.checkpoints import last_checkpoint
from pipeline.training.model import build_model, build_processor
from pipeline.training.train import train
from pipeline.training.trainer import ImageTrainer
from samples import ROOT

SCRIPT = ROOT / "scripts/train_vit.py"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_run_learns_and_leaves_a_model_that_pipeline_loads(tiny_recipe):
    from transformers import pipeline

    summary = train(load_recipe(tiny_recipe, ["--num_train_epochs=4", "--logging_steps=10"], "run"))
    losses = [entry["loss"] for entry in summary["log"] if "loss" in entry]
    assert losses[-1] < losses[0]
    folder = Path("models/run")
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.yaml",
        "training.json",
    }  # no pickle, no optimizer state
    classify = pipeline("image-classification", str(folder))
    from PIL import Image

    answer = classify(Image.new("RGB", (32, 32)), top_k=10)
    assert {a["label"] for a in answer} == {str(n) for n in range(10)}


def test_a_run_without_validation_ends_too(tiny_recipe, capsys):
    options = ["--max_steps=2", "--eval_strategy=no", "--save_strategy=no"]
    recipe = load_recipe(tiny_recipe, [*options, "--load_best_model_at_end=false"], "run")
    train_vit.report(train(recipe))
    assert "not validated" in capsys.readouterr().out


SCHEDULE = ["--image_size_schedule={0: 16, 0.34: 32, 0.67: 48}", "--image_size=48"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kill_after"),
    [(["--linear_probe_samples=200"], [5]), (SCHEDULE, [5, 20, 35])],
    ids=["one size, fitted head", "schedule"],
)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_recipe, here, options, kill_after
):
    # 22 steps an epoch, a checkpoint every 5: killed and resumed in mid-epoch.
    steps = ["--eval_strategy=steps", "--eval_steps=5", "--save_strategy=steps", "--save_steps=5"]
    settings = [*steps, "--num_train_epochs=2", "--logging_steps=5", *options]
    train(load_recipe(tiny_recipe, settings, "whole"))

    folder = here / "models/checkpoints/killed"
    for step in kill_after:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--recipe", tiny_recipe, "--run=killed", *settings],
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not (folder / f"checkpoint-{step}/trainer_state.json").exists():
            assert process.poll() is None, f"it ended before the checkpoint of step {step}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (here / "models/killed").exists()
        assert last_checkpoint(folder) in (
            folder / f"checkpoint-{step}", folder / f"checkpoint-{step + 5}"
        )  # fmt: skip

    summary = train(load_recipe(tiny_recipe, settings, "killed"))
    assert summary["steps"] == 44
    assert_equal(weights(here / "models/killed"), weights(here / "models/whole"))


def test_a_schedule_trains_at_its_sizes_and_saves_the_last(tiny_recipe, here, monkeypatch):
    sizes = []

    def training_step(self, model, inputs, *args, **kwargs):
        sizes.append(self._prepare_inputs(inputs)["pixel_values"].shape[-1])
        return Trainer.training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ImageTrainer, "training_step", training_step)
    train(load_recipe(tiny_recipe, ["--max_steps=9", *SCHEDULE], "run"))
    assert sizes == [16] * 4 + [32] * 3 + [48] * 2
    assert json.loads((here / "models/run/config.json").read_text())["image_size"] == 48
    results = json.loads(json.dumps(evaluate("models/run", load_recipe(tiny_recipe).data)))
    assert results["model"]["image_size"] == 48
    assert results["recipe"] == load_settings("models/run")  # the same as YAML and as JSON
    recipe = load_recipe(str(here / "models/run/recipe.yaml"))
    assert recipe.model.image_size_schedule == {"0": 16, "0.34": 32, "0.67": 48}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("{0: 16, 0.5: 32}", r"ends at 32 pixels, but image_size, .* is 48"),
        ("{0.1: 16, 0.5: 48}", r"increasing from 0"),
        ("{0: 16, 0.5: 32, 0.4: 48}", r"increasing from 0"),
        ("{0: 16, 1.0: 48}", r"increasing from 0"),
        ("[16, 48]", r"to the size in pixels"),
        ("{0: small, 0.5: 48}", r"to the size in pixels"),
        ("{0: 20, 0.5: 48}", r"patches of 16 pixels don't divide"),
        ("{0: 8, 0.5: 48}", r"patches of 16 pixels don't divide"),
        ("{0: 0, 0.5: 48}", r"to the size in pixels"),
    ],
)
def test_a_schedule_that_can_not_be_followed_is_one_sentence(tiny_recipe, schedule, message):
    with pytest.raises(UserError, match=message):
        options = ["--max_steps=9", f"--image_size_schedule={schedule}", "--image_size=48"]
        train(load_recipe(tiny_recipe, options, "run"))


@pytest.fixture(params=["vit", "dinov2"])
def trainer_with_a_worse_end(request, backbones, here):
    """A trainer whose best checkpoint was saved, and whose live weights were then spoilt."""
    (here / "short.yaml").write_text(
        f"{{dataset: digits, model: {backbones[request.param]}, image_size: 32, max_steps: 3}}"
    )
    every = ["--eval_strategy=steps", "--eval_steps=3", "--save_strategy=steps", "--save_steps=3"]
    recipe = load_recipe("short.yaml", [*every, "--disable_tqdm=true"])
    processor = build_processor(recipe.model)
    splits = load_splits(recipe.data, processor, "train", "validation")
    model = build_model(recipe.model, splits["train"].features["label"].names)
    trainer = ImageTrainer(recipe, model, processor, splits["train"], splits["validation"])
    trainer.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    return trainer


def test_every_tensor_comes_back_from_the_best_checkpoint(trainer_with_a_worse_end):
    trainer = trainer_with_a_worse_end
    trainer._load_best_model()
    trainer.model.save_pretrained("reloaded")
    assert_equal(weights(Path("reloaded")), weights(Path(trainer.state.best_model_checkpoint)))


def test_the_stock_trainer_brings_only_some_back(trainer_with_a_worse_end):
    # When this fails, transformers has mended it: `restore` and its two overrides can go.
    trainer = trainer_with_a_worse_end
    Trainer._load_best_model(trainer)
    spoilt = [name for name, p in trainer.model.named_parameters() if (p == 7).all()]
    assert len(spoilt) > 10


def test_a_half_written_checkpoint_is_skipped_with_a_warning(tiny_recipe, here, capsys):
    train(load_recipe(tiny_recipe, ["--num_train_epochs=2"], "run"))
    folder = here / "models/checkpoints/run"
    whole, torn = folder / "checkpoint-22", folder / "checkpoint-44"
    assert last_checkpoint(folder) == torn
    for spoil in (
        lambda: (torn / "trainer_state.json").write_text('{"epoch": 2'),
        lambda: (torn / "trainer_state.json").unlink(),
        lambda: (torn / "model.safetensors").write_bytes(b"\x00" * 100),
    ):
        backup = here / "backup"
        shutil.copytree(torn, backup)
        spoil()
        assert last_checkpoint(folder) == whole
        assert f"Skipping {torn}" in capsys.readouterr().out
        shutil.rmtree(torn)
        backup.rename(torn)


@pytest.mark.slow
def test_a_finished_run_is_left_alone_unless_told(tiny_recipe, here):
    assert train(load_recipe(tiny_recipe, [], "run"))["new"]
    stamp = (here / "models/run/model.safetensors").stat().st_mtime_ns
    again = train(load_recipe(tiny_recipe, [], "run"))
    assert not again["new"]
    assert (here / "models/run/model.safetensors").stat().st_mtime_ns == stamp
    assert train(load_recipe(tiny_recipe, ["--seed=1"], "run"), restart=True)["new"]
    assert (here / "models/run/model.safetensors").stat().st_mtime_ns != stamp


def test_another_recipe_in_the_same_place_is_refused(tiny_recipe):
    train(load_recipe(tiny_recipe, [], "run"))
    with pytest.raises(UserError, match=r"another recipe \(learning_rate is 0.01 now, 0.003 there"):
        train(load_recipe(tiny_recipe, ["--learning_rate=1e-2"], "run"))
    # How fast is another matter.
    assert not train(load_recipe(tiny_recipe, ["--logging_steps=7"], "run"))["new"]


@pytest.mark.slow
def test_all_options_together_train(tiny_recipe):
    options = [
        "--horizontal_flip",
        "--mixup=0.2",
        "--cutmix=1.0",
        "--label_smoothing_factor=0.1",
        "--layer_decay=0.8",
        "--attention=eager",
        "--gradient_accumulation_steps=2",
    ]
    summary = train(load_recipe(tiny_recipe, options, "run"))
    assert summary["steps"] == 11
    assert all(entry["loss"] < 4 for entry in summary["log"] if "loss" in entry)


@pytest.mark.slow
def test_a_compiled_model_trains_alike_and_is_saved_plain(tiny_recipe, here):
    same = ["--max_steps=4", "--eval_strategy=steps", "--eval_steps=2"]
    same += ["--save_strategy=steps", "--save_steps=2"]
    train(load_recipe(tiny_recipe, same, "plain"))
    compiled = [*same, "--torch_compile", "--torch_compile_backend=aot_eager"]
    assert train(load_recipe(tiny_recipe, compiled, "compiled"))["steps"] == 4
    plain, found = weights(here / "models/plain"), weights(here / "models/compiled")
    assert plain.keys() == found.keys()  # no name of the compiler's
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], atol=1e-4, rtol=0)


def test_validation_loss_is_not_smoothed(tiny_recipe):
    summary = train(load_recipe(tiny_recipe, ["--label_smoothing_factor=0.3"], "run"))
    entry = next(e for e in summary["log"] if "eval_loss" in e)
    assert entry["eval_loss"] == pytest.approx(entry["eval_nll"], rel=1e-4)


@pytest.mark.slow
def test_accumulated_batches_train_like_one_large_batch(tiny_recipe, here):
    same = ["--random_crop_padding=0", "--max_steps=5"]
    train(load_recipe(tiny_recipe, same, "one"))
    train(
        load_recipe(
            tiny_recipe,
            [*same, "--per_device_train_batch_size=16", "--gradient_accumulation_steps=4"],
            "four",
        )
    )
    one, four = weights(here / "models/one"), weights(here / "models/four")
    for name in one:
        torch.testing.assert_close(four[name], one[name], atol=2e-4, rtol=0)


@pytest.mark.slow
def test_two_processes_give_the_validation_loss_of_one(tiny_recipe, here):
    # Only whole batches: of a last smaller one, two processes score some images twice.
    same = ["--random_crop_padding=0", "--max_steps=20", "--eval_strategy=steps", "--eval_steps=5"]
    same += ["--save_strategy=steps", "--save_steps=5"]
    one = train(load_recipe(tiny_recipe, same, "one"))
    script = [SCRIPT, "--recipe", tiny_recipe, "--run=two", "--per_device_train_batch_size=32"]
    result = two_processes("ddp", [*script, *same])
    assert result.returncode == 0, result.stderr[-2000:]
    two = json.loads((here / "models/two/training.json").read_text())
    assert two["processes"] == 2
    assert two["steps"] == one["steps"]
    losses = [
        [entry["eval_nll"] for entry in summary["log"] if "eval_nll" in entry]
        for summary in (one, two)
    ]
    assert losses[0][-1] < 0.9 * losses[0][0]  # it did learn
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    # The same images, and about as many of them right.
    total = one["validation_images"]
    low, high = wilson_interval(round(one["validation_accuracy"] * total), total)
    assert low <= two["validation_accuracy"] <= high


@pytest.mark.slow
def test_the_trained_model_agrees_with_pipeline_on_real_images(shared, here):
    """1,000 real test images: training-side predictions against plain `pipeline()`."""
    import datasets
    from transformers import pipeline

    from pipeline.data.loading import load_split
    from pipeline.evaluation.evaluate import predict
    from pipeline.training.model import load_model

    recipe = load_recipe(
        "cpu",
        [
            f"--dataset={shared / 'data/cifar10'}",
            f"--model={shared / 'models/dinov2-small'}",
            "--image_size=42",
            "--image_size_schedule=null",
            "--linear_probe_samples=100",
            "--max_steps=3",
            "--max_train_samples=200",
            "--per_device_train_batch_size=16",
            "--validation_size=0.001",
            "--disable_tqdm=true",
        ],
        "run",
    )
    train(recipe)
    model, processor = load_model("models/run")
    test = load_split(recipe.data, "test", processor)
    logits, labels = predict(model, processor, test.select(range(1000)))
    raw = datasets.load_dataset(str(shared / "data/cifar10"), split="test[:1000]")
    assert labels.tolist() == raw["label"][:]
    answers = pipeline("image-classification", "models/run", batch_size=100)(
        raw["img"][:], top_k=10
    )
    names = [model.config.id2label[i] for i in range(10)]
    theirs = torch.tensor(
        [[{a["label"]: a["score"] for a in answer}[name] for name in names] for answer in answers]
    )
    ours = logits.softmax(dim=1)
    assert (ours.argmax(1) == theirs.argmax(1)).sum() >= 999
    assert (ours - theirs).abs().max() < 0.02
