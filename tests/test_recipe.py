from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.recipe import NON_SEMANTIC_KEYS, RECIPES, load_recipe


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_every_recipe_is_understood(name):
    recipe = load_recipe(name)
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for key, value in written.items():
        if isinstance(value, dict):
            value = {str(k): v for k, v in value.items()}
        if key not in NON_SEMANTIC_KEYS:
            assert recipe.settings[key] == value
    assert recipe.model_folder == Path("models") / name
    assert recipe.checkpoint_folder == Path("models/checkpoints") / name


def test_the_command_line_wins_over_the_file():
    recipe = load_recipe(
        "vit-base",
        ["--learning_rate=2e-4", "--seed", "7", "--horizontal_flip=false", "--mixup", "0.2"],
    )
    assert recipe.training.learning_rate == 2e-4
    assert recipe.training.seed == 7
    assert not recipe.augmentation.horizontal_flip
    assert recipe.augmentation.mixup == 0.2
    assert recipe.settings["learning_rate"] == 2e-4


def test_a_saved_recipe_gives_the_same_run_again(tmp_path):
    first = load_recipe("demo", ["--learning_rate=3e-3"])
    first.save(tmp_path)
    again = load_recipe(str(tmp_path / "recipe.yaml"), run="demo")
    assert again.settings == first.settings
    assert again.model.model_config["hidden_size"] == 96


def test_a_number_written_without_a_point_is_a_number(tmp_path):
    # YAML 1.1 reads 1e-4 as a word.
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-4\n")
    assert load_recipe(str(tmp_path / "r.yaml")).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--learnig_rate=1"], 'no key "learnig_rate"; did you mean "learning_rate"?'),
        (["--xyzzy=1"], 'no key "xyzzy"'),
        (["--learning_rate=fast"], "learning_rate: invalid float value: 'fast'"),
        (["--validation_size=1.5"], "validation_size is 1.5"),
        (["--attention=flash"], 'attention is "flash"'),
        (["--eval_strategy=often"], "eval_strategy"),
        (["--flip"], '"flip" is now "horizontal_flip"'),
        (["stray"], 'Cannot read "stray"'),
        (["--epochs=3"], 'no key "epochs"; did you mean "num_train_epochs"?'),
        (["--lr=1"], 'did you mean "learning_rate"?'),
        (["--batch_size=1"], 'did you mean "per_device_train_batch_size"?'),
        (["--mixup=-1"], "mixup is -1.0; it must be 0 or more"),
        (["--layer_decay=-1"], "layer_decay is -1.0; it must be more than 0 and at most 1"),
        (["--image_size=0"], "image_size is 0; it must be at least 1"),
        (["--per_device_train_batch_size=0"], "per_device_train_batch_size is 0"),
        (["--learning_rate=-1e-3"], "learning_rate is -0.001; it must be more than 0"),
        (["--label_smoothing_factor=1"], "label_smoothing_factor is 1.0"),
        (["--max_train_samples=0"], "max_train_samples is 0"),
        (["--resize=fit"], 'resize is "fit"; choose squash or crop'),
        (["--metric_for_best_model=acuracy"], 'metric_for_best_model is "acuracy"; choose from'),
        (["--report_to=wandbb"], 'report_to is "wandbb", which is not available'),
        (["--push_to_hub"], "`make push`"),
        (["--hub_model_id=x/y"], "`make push`"),
        (["--class_weights=even"], "class_weights is even; use balanced"),
        (["--class_weights={cat: -1}"], "class_weights is {'cat': -1}; use balanced"),
        (["--class_weights={cat: null}"], "a weight of 0 or more for each class name"),
        (["--class_weights=[1, 2]"], "class_weights is [1, 2]"),
        (["--class_weights=2"], "class_weights is 2"),
        (
            ["--save_steps=10", "--eval_steps=5"],
            "save_steps is 10 and eval_steps 5: make",
        ),
        (["--save_only_model"], 'can\'t set "save_only_model": this pipeline sets it'),
        (["--resume_from_checkpoint=x"], 'can\'t set "resume_from_checkpoint"'),
        (
            ["--early_stopping_patience=2", "--load_best_model_at_end=false"],
            "needs load_best_model_at_end",
        ),
        (['--model_config={"model_type": "vit", "hiden_size": 3}'], 'did you mean "hidden_size"'),
        (['--model_config={"model_type": "vitt"}'], 'did you mean "vit"'),
    ],
)
def test_a_wrong_setting_is_named(overrides, message):
    with pytest.raises(UserError) as error:
        load_recipe("demo", overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("metric", ["nll", "loss", "eval_loss", "accuracy", "macro_f1"])
def test_lower_is_better_for_losses_only(metric):
    training = load_recipe("demo", [f"--metric_for_best_model={metric}"]).training
    assert training.greater_is_better == (metric in ("accuracy", "macro_f1"))


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(UserError, match=r'no recipe "resnet".*cpu, demo, dinov2-small, vit-base'):
        load_recipe("resnet")


def test_an_unknown_key_in_the_file_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text("imagesize: 98\n")
    with pytest.raises(UserError, match='"imagesize"; did you mean "image_size"'):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_wrong_type_in_the_file_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 1.5\n")
    with pytest.raises(UserError, match=r"seed: invalid int value: '1\.5'"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_lone_flag_is_true():
    recipe = load_recipe("demo", ["--streaming", "--max_steps=9", "--horizontal_flip", "--seed=3"])
    assert recipe.data.streaming
    assert recipe.augmentation.horizontal_flip


def test_streaming_defaults_follow_the_command_line(tmp_path):
    (tmp_path / "r.yaml").write_text("streaming: true\nmax_steps: 10\n")
    assert load_recipe(str(tmp_path / "r.yaml")).training.save_strategy == "steps"
    plain = load_recipe(str(tmp_path / "r.yaml"), ["--streaming=false"])
    assert plain.training.save_strategy == "epoch"
    (tmp_path / "r.yaml").write_text("max_steps: 10\n")
    for options in (["--streaming"], ["--streaming", "true"], ["--streaming=t"], ["--streaming=Y"]):
        assert load_recipe(str(tmp_path / "r.yaml"), options).training.save_steps == 0.1


def test_an_empty_streaming_is_false(tmp_path):
    (tmp_path / "r.yaml").write_text("streaming:\n")
    assert load_recipe(str(tmp_path / "r.yaml")).training.save_strategy == "epoch"


def test_class_names_may_be_numbers():
    weights = load_recipe("demo", ["--class_weights={3: 2.0}"]).objective.class_weights
    assert weights == {"3": 2.0}


def test_a_recipe_from_the_hub_sets_what_is_learned_and_nothing_else():
    from pipeline.recipe_checks import check_keys

    check_keys(["learning_rate", "image_size"], {"image_size"}, from_hub=True)
    for key in ("report_to", "torch_compile", "dataloader_num_workers", "deepspeed"):
        with pytest.raises(UserError, match=f'recipe from the Hub can\'t set "{key}"'):
            check_keys([key], {"image_size"}, from_hub=True)
