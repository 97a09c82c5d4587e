"""A run's life: its name, its folders, signals, resuming, and what ends it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from filelock import FileLock

from pipeline import runs
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate
from pipeline.publish.provenance import evaluated_data
from pipeline.recipe import data_arguments, load_recipe
from pipeline.training.callbacks import StopOnSignal
from pipeline.training.checkpoints import last_checkpoint
from pipeline.training.train import build_trainer, train
from samples import ROOT, draw_image

SCRIPT = ROOT / "scripts/train_vit.py"
STEPS = ["--eval_strategy=steps", "--eval_steps=5", "--save_strategy=steps", "--save_steps=5"]


@pytest.mark.parametrize("name", ["..", "../other", "a b", ".hidden", "checkpoints", "a/b", ""])
def test_a_run_is_one_plain_folder_name(name):
    with pytest.raises(UserError, match="can't name a run"):
        load_recipe("demo", run=name)


def test_a_folder_of_something_else_is_neither_used_nor_removed(tiny_recipe, here):
    (here / "models/run").mkdir(parents=True)
    (here / "models/run/thesis.txt").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(UserError, match="models/run is not a run of this pipeline"):
            train(load_recipe(tiny_recipe, [], "run"), restart=restart)
    assert (here / "models/run/thesis.txt").exists()


def test_restart_removes_nothing_before_data_and_model_are_loaded(tiny_recipe, here):
    train(load_recipe(tiny_recipe, ["--max_steps=2"], "run"))
    with pytest.raises(UserError, match='no folder "./nowhere"'):
        train(load_recipe(tiny_recipe, ["--dataset=./nowhere"], "run"), restart=True)
    assert (here / "models/run/model.safetensors").exists()


def test_a_second_run_of_a_name_is_refused_while_the_first_trains(tiny_recipe, here):
    (here / "models/checkpoints").mkdir(parents=True)
    recipe = load_recipe(tiny_recipe, ["--max_steps=2"], "run")
    refused = pytest.raises(UserError, match='"run" is being trained by another process')
    with FileLock(here / "models/checkpoints/.run.lock"), refused:
        train(recipe)
    assert train(load_recipe(tiny_recipe, ["--max_steps=2"], "run"))["new"]


@pytest.mark.slow
def test_another_number_of_processes_is_refused_on_resume(tiny_recipe, here):
    train(load_recipe(tiny_recipe, ["--max_steps=10", *STEPS], "run"))
    for file in (here / "models/run").iterdir():
        file.unlink()
    (here / "models/run").rmdir()
    setup = here / "models/checkpoints/run/setup.json"
    runs.write_json(setup, runs.read_json(setup) | {"processes": 2})
    with pytest.raises(UserError, match=r"trained in 2 processes, not 1,.*NPROC=2"):
        train(load_recipe(tiny_recipe, ["--max_steps=10", *STEPS], "run"))


def test_other_data_is_refused_on_resume_and_on_evaluation(tiny_recipe, image_folder, here):
    options = [f"--dataset={image_folder}", "--validation_size=0.25", "--max_steps=10", *STEPS]
    recipe = load_recipe(tiny_recipe, options, "run")
    train(recipe)
    evaluate("models/run", recipe.data)
    draw_image(999).save(image_folder / "train/cat/new.png")
    with pytest.raises(UserError, match=r"not the images .* was trained on"):
        evaluate("models/run", recipe.data)
    shutil.rmtree("models/run")
    with pytest.raises(UserError, match=r"images or classes of .* are not those"):
        train(recipe)


def test_other_labels_evaluate_a_published_split_but_not_a_part_of_train(tiny_recipe, here):
    rows = [{"image": draw_image(i), "label": i % 2, "other": i // 2 % 2} for i in range(60)]
    names = ClassLabel(names=["cat", "dog"])
    features = Features({"image": ImageFeature(), "label": names, "other": names})
    for folder, test in (("one", None), ("two", 20)):
        Dataset.from_list(rows, features).to_parquet(f"{folder}/train.parquet")
        if test:
            Dataset.from_list(rows[:test], features).to_parquet(f"{folder}/test.parquet")
        options = [f"--dataset={folder}", "--label_column=label", "--validation_size=0.25"]
        train(load_recipe(tiny_recipe, [*options, "--max_steps=1", *STEPS], folder))
    with pytest.raises(UserError, match=r"not the images .* it may have seen test images"):
        evaluate("models/one", data_arguments("models/one", label="other"))
    results = evaluate("models/two", data_arguments("models/two", label="other"))
    assert results["support"] == [10, 10]
    assert results["dataset"]["label_column"] == "other"
    data = evaluated_data(Path("models/two"), results, None)
    assert data.label_column == "other"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_same_command_resumes(tiny_recipe, here, number):
    command = [sys.executable, SCRIPT, "--recipe", tiny_recipe, "--run=run", "--max_steps=3000"]
    command += ["--logging_steps=5", *STEPS, "--eval_steps=1000", "--save_steps=1000"]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    for line in process.stdout:  # the first log: training has begun
        if "'loss'" in line:
            break
    time.sleep(0.2)
    process.send_signal(number)
    process.stdout.read()
    errors = process.stderr.read()
    assert process.wait() == 1
    assert "Error: Stopped by a signal at step" in errors
    assert "Traceback" not in errors
    checkpoint = last_checkpoint(here / "models/checkpoints/run")
    step = int(checkpoint.name.split("-")[1])
    assert 0 < step < 3000
    assert not (here / "models/run").exists()
    settings = command[5:]
    trainer = build_trainer(load_recipe(tiny_recipe, settings, "run"))
    trainer.args.max_steps = step + 2
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == step + 2


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tiny_recipe):
    options = ["--learning_rate=1e30", "--max_grad_norm=0", "--logging_steps=1", "--max_steps=20"]
    with pytest.raises(
        UserError, match=r"diverged: .*loss is (nan|inf) at step \d+.*learning_rate"
    ):
        train(load_recipe(tiny_recipe, options, "run"))


def test_a_run_of_an_earlier_version_with_early_stopping_goes_on(tiny_recipe):
    options = ["--early_stopping_patience=2", "--max_steps=1"]
    recipe = load_recipe(tiny_recipe, options, "run")
    assert train(recipe)["new"]
    for file in (recipe.model_folder / "recipe.yaml", recipe.checkpoint_folder / "recipe.yaml"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if "early_stopping" not in line))
    assert not train(load_recipe(tiny_recipe, options, "run"))["new"]


def test_several_gpus_in_one_process_are_refused(tiny_recipe, monkeypatch):
    recipe = load_recipe(tiny_recipe, [], "run")
    monkeypatch.setattr(type(recipe.training), "n_gpu", 2)
    with pytest.raises(UserError, match=r"has 2 GPUs, .* start NPROC=2"):
        train(recipe)


@pytest.mark.slow
def test_early_stopping_counts_on_after_a_resume(tiny_recipe, monkeypatch):
    options = ["--early_stopping_patience=2", "--learning_rate=1e-9", "--num_train_epochs=9"]
    recipe = load_recipe(tiny_recipe, options, "run")
    stop = StopOnSignal.on_step_end

    def stop_in_epoch_three(self, args, state, control, **kwargs):
        self.received = state.epoch > 2.1
        return stop(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", stop_in_epoch_three)
    with pytest.raises(UserError, match="Stopped by a signal"):
        train(recipe)
    monkeypatch.undo()
    assert train(load_recipe(tiny_recipe, options, "run"))["epochs"] == 3


@pytest.mark.slow
def test_training_ends_early_where_validation_does_not_improve(tiny_recipe):
    options = ["--early_stopping_patience=2", "--learning_rate=1e-9", "--num_train_epochs=9"]
    summary = train(load_recipe(tiny_recipe, options, "run"))
    assert summary["epochs"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["nll", "loss", "macro_f1", "balanced_accuracy"])
def test_the_best_checkpoint_is_best_by_the_metric_that_was_asked_for(tiny_recipe, metric):
    options = [f"--metric_for_best_model={metric}", "--num_train_epochs=3", "--learning_rate=0.02"]
    summary = train(load_recipe(tiny_recipe, options, "run"))
    log = {e["step"]: e for e in summary["log"] if "eval_nll" in e}
    best = min if metric in ("nll", "loss") else max
    values = {step: entry[f"eval_{metric}"] for step, entry in log.items()}
    assert values[summary["best_step"]] == best(values.values())
    # The accuracy reported is that of the saved weights, whatever picked them.
    assert summary["validation_accuracy"] == log[summary["best_step"]]["eval_accuracy"]
    assert 0 <= summary["validation_accuracy"] <= 1


def test_without_reloading_the_best_the_accuracy_is_that_of_the_last_weights(tiny_recipe):
    options = ["--load_best_model_at_end=false", "--num_train_epochs=2", "--learning_rate=0.05"]
    summary = train(load_recipe(tiny_recipe, options, "run"))
    last = [entry for entry in summary["log"] if "eval_nll" in entry][-1]
    assert (summary["best_step"], summary["validation_accuracy"]) == (44, last["eval_accuracy"])


def test_checkpoints_must_be_validated_to_pick_the_best(tiny_recipe):
    options = ["--eval_strategy=steps", "--eval_steps=5", "--save_strategy=steps"]
    for steps, message in ((7, "round multiple of the evaluation"), (10, "make them equal")):
        with pytest.raises(UserError, match=message):
            load_recipe(tiny_recipe, [*options, f"--save_steps={steps}"])


def test_class_weights_are_balanced_or_by_name(tiny_recipe):
    trainer = build_trainer(load_recipe(tiny_recipe, ["--class_weights=balanced"], "run"))
    labels = trainer.train_dataset.labels
    weights = trainer.class_weights
    assert weights[labels].mean().item() == pytest.approx(1, abs=1e-4)
    counts = [(labels == c).sum() for c in range(10)]
    assert weights.argmax().item() == counts.index(min(counts))
    trainer = build_trainer(load_recipe(tiny_recipe, ['--class_weights={"3": 2.5}'], "run"))
    assert trainer.class_weights.tolist() == [1, 1, 1, 2.5, 1, 1, 1, 1, 1, 1]
    with pytest.raises(UserError, match='class_weights names an unknown class "cat"; use 0, 1'):
        build_trainer(load_recipe(tiny_recipe, ['--class_weights={"cat": 2}'], "run"))


def test_settings_of_speed_and_reporting_do_not_block_a_resume(tiny_recipe):
    train(load_recipe(tiny_recipe, ["--max_steps=2"], "run"))
    options = ["--max_steps=2", "--per_device_eval_batch_size=7", "--dataloader_num_workers=1"]
    assert not train(load_recipe(tiny_recipe, options, "run"))["new"]
    assert Path("models/run").exists()
