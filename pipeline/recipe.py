"""Recipes: the YAML file of an experiment's settings, overridden by the command line.

Its keys are the fields of the dataclasses here and of transformers' `TrainingArguments`. The file
sets the defaults of a `HfArgumentParser`, so that a value means the same in both places.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from pipeline.errors import UserError
from pipeline.recipe_checks import LOWER_IS_BETTER, NON_SEMANTIC_KEYS, check_keys, check_values
from pipeline.runs import MODELS, check_run_name, model_file, pin, write_text

RECIPES = Path(__file__).parent / "recipes"
# Defaults for every recipe: validate and save once per epoch, and keep the best checkpoint.
DEFAULTS = {
    **dict.fromkeys(("eval_strategy", "save_strategy"), "epoch"),
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "logging_steps": 50,
    "report_to": "none",
}
# Defaults for a streamed recipe, which has no epochs: validate and save ten times.
STREAMING_DEFAULTS = dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
STREAMING_DEFAULTS |= dict.fromkeys(("eval_steps", "save_steps"), 0.1)


@dataclass
class DataArguments:
    """The images and how they are split."""

    dataset: str = HfArg(
        default="uoft-cs/cifar10",
        help="a Hub id, a local folder (see the README), or digits",
    )
    dataset_config: str | None = HfArg(default=None, help="its configuration")
    dataset_revision: str | None = HfArg(default=None, help="its commit or tag")
    image_column: str | None = HfArg(default=None, help="default: the only image column")
    label_column: str | None = HfArg(default=None, help="default: the only label column")
    train_split: str = HfArg(default="train", help="the split to train on")
    test_split: str = HfArg(default="test", help="the split to evaluate; default: 20 % of train")
    validation_split: str | None = HfArg(default=None, help="the split to pick the checkpoint by")
    validation_size: float = HfArg(default=0.05, help="share of train to split off for validation")
    max_train_samples: int | None = HfArg(
        default=None, help="train on only this many images, with the same share of each class"
    )
    skip_corrupt: bool = HfArg(default=False, help="skip images that can't be decoded")
    streaming: bool = HfArg(default=False, help="read images while training; store none")
    num_proc: int | None = HfArg(
        default=None, help="processes that decode images (threads if streaming)"
    )


@dataclass
class ModelArguments:
    """The backbone and its options."""

    model: str | None = HfArg(
        default="google/vit-base-patch16-224-in21k", help="the backbone: a Hub id or a local folder"
    )
    model_revision: str | None = HfArg(default=None, help="its commit or tag")
    model_config: dict | str | None = HfArg(
        default=None, help="build an untrained model of this configuration instead of `model`"
    )
    image_size: int = HfArg(default=224, help="side of the model's input, in pixels")
    image_size_schedule: dict | str | None = HfArg(
        default=None, help="sizes to train at, by share of steps done, such as {0: 56, 0.5: 98}"
    )
    resize: str = HfArg(default="squash", help="squash images to squares, or crop their center")
    attention: str = HfArg(default="auto", help="in training: sdpa, eager, or auto (the faster)")
    freeze_backbone: bool = HfArg(default=False, help="train only the head")
    linear_probe_samples: int = HfArg(default=0, help="first fit the head to so many images")
    drop_path_rate: float = HfArg(default=0.0, help="stochastic depth, if the model supports it")
    layer_decay: float = HfArg(default=1.0, help="a layer's learning rate divided by the next's")

    def __post_init__(self):
        self.model_config = _parse(self.model_config)
        self.image_size_schedule = _parse(self.image_size_schedule)
        if self.model_config is not None:
            self.model = self.model_revision = None


@dataclass
class AugmentationArguments:
    """Augmentations of training images. For label smoothing, see `label_smoothing_factor`."""

    horizontal_flip: bool = HfArg(default=False, help="flip half of the images horizontally")
    random_crop_padding: float = HfArg(default=0.0, help="shift by up to this share of the side")
    mixup: float = HfArg(default=0.0, help="Beta parameter of mixup; 0 is off")
    cutmix: float = HfArg(default=0.0, help="Beta parameter of CutMix; 0 is off")


@dataclass
class ObjectiveArguments:
    """The loss, early stopping and calibration."""

    class_weights: dict | str | None = HfArg(
        default=None, help="class weights in the loss: balanced, or a weight for each class name"
    )
    early_stopping_patience: int | None = HfArg(
        default=None, help="end training after this many validations without improvement"
    )
    calibrate: bool = HfArg(default=False, help="scale the head by a temperature fit on validation")

    def __post_init__(self):
        self.class_weights = _parse(self.class_weights)


RECIPE_GROUPS = (DataArguments, ModelArguments, AugmentationArguments, ObjectiveArguments)
RECIPE_DEFAULTS = {key.name: key.default for group in RECIPE_GROUPS for key in fields(group)}


@dataclass
class Recipe:
    """One resolved experiment; `settings` holds all values that affect the trained model."""

    run: str
    data: DataArguments
    model: ModelArguments
    augmentation: AugmentationArguments
    objective: ObjectiveArguments
    training: TrainingArguments
    settings: dict

    @property
    def model_folder(self) -> Path:
        """The folder of the trained model."""
        return MODELS / self.run

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the checkpoints."""
        return Path(self.training.output_dir)

    def pin_sources(self, resume: bool) -> None:
        """Pin dataset and backbone to commits (see `runs.pin`); a resumed run keeps its commits."""
        files = (self.model_folder / "recipe.yaml", self.checkpoint_folder / "recipe.yaml")
        saved = next((_read_yaml(file) for file in files if resume and file.is_file()), {})
        for group, key in ((self.data, "dataset"), (self.model, "model")):
            name, revision = getattr(group, key), getattr(group, f"{key}_revision")
            if saved.get(key) == name and revision in (None, saved.get(f"{key}_revision")):
                revision = saved.get(f"{key}_revision")
            elif name is not None and (key, name) != ("dataset", "digits"):
                name, revision = pin(key, name, revision)
            for attribute, value in ((key, name), (f"{key}_revision", revision)):
                setattr(group, attribute, value)
                self.settings[attribute] = value

    def save(self, folder: Path) -> None:
        """Save `recipe.yaml`, from which `load_recipe` reproduces the run."""
        write_text(folder / "recipe.yaml", to_yaml(self.settings))


def _parse(value):
    """Parse a mapping given on the command line as YAML; keys become strings, as in JSON."""
    value = yaml.safe_load(value) if isinstance(value, str) else value
    return {str(key): v for key, v in value.items()} if isinstance(value, dict) else value


class _Parser(HfArgumentParser):
    def error(self, message):
        message = re.sub(r"argument --(\w+)[^:]*:", r"\1:", message)
        raise UserError(f"Recipe: {message}.")


def load_recipe(name: str, overrides: list[str] = (), run: str | None = None) -> Recipe:
    """Load a recipe.

    Args:
        name: A file in `pipeline/recipes`, a YAML file, or a published model as
            `hub:name/model@rev`.
        overrides: Arguments such as `--seed=1`.
        run: The run's name; by default the recipe's.

    Raises:
        UserError: There is no such recipe, a key is unknown, or a value is invalid.
    """
    path = _find(name)
    settings = _read_yaml(path)
    overrides = list(overrides)
    pairs = [arg[2:].partition("=") for arg in overrides if arg.startswith("--")]
    given = {key.replace("-", "_"): value for key, _, value in pairs}
    check_keys(list(settings), set(RECIPE_DEFAULTS), from_hub=name.startswith("hub:"))
    check_keys(list(given), set(RECIPE_DEFAULTS))

    parser = _Parser((*RECIPE_GROUPS, TrainingArguments), allow_abbrev=False)
    first = _Parser(DataArguments, allow_abbrev=False)
    first.set_defaults(streaming=str(settings.get("streaming") or False))
    options = {"args": overrides, "return_remaining_strings": True}
    streaming = first.parse_args_into_dataclasses(**options)[0].streaming
    settings = DEFAULTS | (STREAMING_DEFAULTS if streaming else {}) | settings
    # Our columns are not the model's. The filter would sync with the device at every step, and
    # would hide a diverged loss in the logs.
    fixed = {"remove_unused_columns": False, "logging_nan_inf_filter": False}
    fixed["restore_callback_states_from_checkpoint"] = True  # early stopping counts on
    if not torch.accelerator.is_available():
        fixed["use_cpu"] = True  # otherwise TrainingArguments rejects bf16
    elif "accelerator_config" not in settings:  # copy a batch while the device computes
        fixed["accelerator_config"] = {"non_blocking": True}
    for key, value in (settings | fixed).items():
        # argparse checks the type of a default only if it is a string.
        as_is = value is None or isinstance(value, (dict, list))
        parser.set_defaults(**{key: value if as_is else str(value)})

    if run is None:
        run = re.sub("@.*", "", name.split("/")[-1]).removesuffix(path.suffix)
    check_run_name(run)
    args = [*overrides, f"--output_dir={MODELS / 'checkpoints' / run}"]
    try:
        *groups, training, unknown = parser.parse_args_into_dataclasses(
            args, return_remaining_strings=True
        )
    # TrainingArguments checks its values too.
    except (ValueError, TypeError, ImportError, yaml.YAMLError) as error:
        raise UserError(f"Recipe: {error}") from None
    if unknown:
        raise UserError(f'Cannot read "{unknown[0]}": write settings as --key=value.')
    resolved = {key: value for group in groups for key, value in asdict(group).items()}
    for key in (*settings, *given):
        value = getattr(training, key, None)
        resolved.setdefault(key, getattr(value, "value", value))  # convert enums to values
    resolved = {key: value for key, value in resolved.items() if key not in NON_SEMANTIC_KEYS}
    if "greater_is_better" not in (*settings, *given):
        metric = (training.metric_for_best_model or "").removeprefix("eval_")
        training.greater_is_better = metric not in LOWER_IS_BETTER
    training.run_name = training.run_name or run  # in the dashboards of report_to
    recipe = Recipe(run, *groups, training, resolved)
    check_values(recipe)
    return recipe


def to_yaml(settings: dict) -> str:
    """Return settings as the text of a recipe.yaml."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def load_settings(model: str) -> dict | None:
    """Return the settings a model was trained with, from its recipe.yaml, if any."""
    path = model_file(model, "recipe.yaml")
    return _read_yaml(path) if path else None


def data_arguments(
    model: str, dataset: str | None = None, image: str | None = None, label: str | None = None
) -> DataArguments:
    """Return the data arguments of a model's recipe, with another dataset or columns if given.

    Raises:
        UserError: There is neither a recipe nor a dataset.
    """
    settings = load_settings(model)
    if settings is None and dataset is None:
        raise UserError(f'"{model}" has no recipe.yaml: name the dataset with DATASET=.')
    keys = [key.name for key in fields(DataArguments)]
    data = DataArguments(**{key: settings[key] for key in keys if key in (settings or {})})
    image, label = image or data.image_column, label or data.label_column
    data = replace(data, image_column=image, label_column=label)
    if dataset is None:
        return data
    return replace(data, dataset=dataset, dataset_config=None, dataset_revision=None)


def _find(name: str) -> Path:
    if name.startswith("hub:"):
        model = name.removeprefix("hub:")
        path = model_file(model, "recipe.yaml")
        if path is None:
            raise UserError(f'The model "{model}" has no recipe.yaml: choose another recipe.')
        return path
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise UserError(
            f'There is no recipe "{name}"; choose from {known}, name a YAML file, or a '
            "published model as hub:name/model."
        )
    return path


def _read_yaml(path: Path) -> dict:
    try:
        settings = yaml.safe_load(path.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a recipe: it should have lines of the form key: value.")
    return settings
