"""A recipe is the experiment: a YAML file of settings, and the command line that overrides it.

The keys are the fields of the dataclasses here and of transformers' `TrainingArguments`.
"""

import difflib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import HfArgumentParser, TrainingArguments

from pipeline.errors import UserError
from pipeline.revision import hub_commit

RECIPES = Path(__file__).parent / "recipes"
MODELS = Path("models")
# Beneath every recipe: validate and save once an epoch, end with the best.
DEFAULTS = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "logging_steps": 50,
    "report_to": "none",
}
# Beneath a streamed one, which has no epochs: validate and save ten times.
STREAMED = {
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
}
# Settings that say where and how fast, not what is learned: a run may go on under others.
INCIDENTAL = {
    "num_proc",
    "attention",
    "logging_steps",
    "save_total_limit",
    "disable_tqdm",
    "report_to",
    "torch_compile",
}


@dataclass
class DataArguments:
    """Which images, and how they are split."""

    dataset: str = field(
        default="uoft-cs/cifar10",
        metadata={"help": "a Hub id, a local folder (parquet, or one folder per class), or digits"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    dataset_revision: str | None = field(default=None, metadata={"help": "its commit or tag"})
    image_column: str | None = field(default=None, metadata={"help": "default: the only one"})
    label_column: str | None = field(default=None, metadata={"help": "default: the only one"})
    train_split: str = field(default="train", metadata={"help": "the split to learn from"})
    test_split: str = field(
        default="test", metadata={"help": "the split to score; carved from train if there is none"}
    )
    validation_size: float = field(
        default=0.05, metadata={"help": "share of train that picks the checkpoint"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read images as they are learned from, and keep none"}
    )
    num_proc: int | None = field(
        default=None, metadata={"help": "processes that decode images; threads, where streaming"}
    )


@dataclass
class ModelArguments:
    """Which backbone, and how it is set up."""

    model: str | None = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={"help": "the backbone: a Hub id or a local folder"},
    )
    model_revision: str | None = field(default=None, metadata={"help": "its commit or tag"})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "build this configuration, untrained, in place of a model"}
    )
    image_size: int = field(default=224, metadata={"help": "side of the model's input, in pixels"})
    attention: str = field(
        default="auto",
        metadata={"help": "implementation in training: sdpa, eager, or auto, the faster one here"},
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "train the head alone"})
    drop_path: float = field(
        default=0.0, metadata={"help": "stochastic depth of the last layer; less before it"}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "learning rate of a layer over that of the one above it"}
    )
    weight_average: float = field(
        default=0.0,
        metadata={
            "help": "score and save a running average of the weights, their mean age this "
            "share of the steps so far; 0 is off"
        },
    )

    def __post_init__(self):
        if isinstance(self.model_config, str):
            self.model_config = json.loads(self.model_config)
        if self.model_config is not None:
            self.model = self.model_revision = None


@dataclass
class AugmentationArguments:
    """What is done to training images. Label smoothing is `label_smoothing_factor`."""

    flip: bool = field(default=False, metadata={"help": "mirror half of the images"})
    crop_padding: float = field(
        default=0.0, metadata={"help": "shift by up to this share of the side"}
    )
    mixup: float = field(default=0.0, metadata={"help": "Beta parameter of mixup; 0 is off"})
    cutmix: float = field(default=0.0, metadata={"help": "Beta parameter of CutMix; 0 is off"})


OWN = (DataArguments, ModelArguments, AugmentationArguments)
OWN_DEFAULTS = {key.name: key.default for part in OWN for key in fields(part)}


@dataclass
class Recipe:
    """One experiment, resolved.

    `run` names its folders in `models` and `models/checkpoints`. `settings` are all values
    that say what is learned, as they were asked for: enough to do it again.
    """

    run: str
    data: DataArguments
    model: ModelArguments
    augmentation: AugmentationArguments
    training: TrainingArguments
    settings: dict

    @property
    def model_folder(self) -> Path:
        return MODELS / self.run

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.training.output_dir)

    def save(self, folder: Path) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(self.settings, sort_keys=False))


class _Parser(HfArgumentParser):
    def error(self, message):
        message = re.sub(r"argument --(\w+)[^:]*:", r"\1:", message)
        raise UserError(f"Recipe: {message}.")


def load_recipe(name: str, overrides: list[str] = (), run: str | None = None) -> Recipe:
    """The recipe of that name, YAML file or published model (`hub:name/model@rev`).

    Arguments such as `--seed=1` override it. Raises UserError for no such recipe, an unknown
    key or a value of the wrong kind.
    """
    path = _find(name)
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no recipe: it should hold lines of the form key: value.")
    _check_keys(settings)
    given = dict(_split_override(argument) for argument in _join_values(overrides))
    _check_keys(given)
    streaming = str((settings | given).get("streaming", False)).lower() in ("true", "yes", "1")
    settings = DEFAULTS | (STREAMED if streaming else {}) | settings | given
    # Everything through one parser, so that a file and the command line mean the same.
    arguments = [f"--{k}={_as_argument(v)}" for k, v in settings.items() if v is not None]
    run = run or re.sub("@.*", "", name.split("/")[-1]).removesuffix(path.suffix)
    arguments.append(f"--output_dir={MODELS / 'checkpoints' / run}")
    arguments.append("--remove_unused_columns=false")  # ours are not the model's
    # The filter waits for the device at every step, and logs a diverged loss as a sound one.
    arguments.append("--logging_nan_inf_filter=false")
    if not torch.accelerator.is_available():
        arguments.append("--use_cpu=true")  # else TrainingArguments refuses bf16
    elif "accelerator_config" not in settings:  # send a batch while the device works on the last
        arguments.append('--accelerator_config={"non_blocking": true}')
    parser = _Parser((*OWN, TrainingArguments), allow_abbrev=False)
    try:
        *own, training = parser.parse_args_into_dataclasses(arguments)
    except (ValueError, TypeError, ImportError) as error:  # TrainingArguments' own checks
        raise UserError(f"Recipe: {error}") from None
    resolved = {k: v for part in own for k, v in asdict(part).items()}
    resolved |= {k: _plain(getattr(training, k)) for k in settings if k not in resolved}
    resolved = {k: v for k, v in resolved.items() if k not in INCIDENTAL}
    recipe = Recipe(run, *own, training, resolved)
    _check_values(recipe)
    return recipe


def _find(name: str) -> Path:
    if name.startswith("hub:"):
        repo, _, revision = name.removeprefix("hub:").partition("@")
        commit = hub_commit("model", repo, revision or None)
        try:
            return Path(hf_hub_download(repo, "recipe.yaml", revision=commit or revision or None))
        except (OSError, EntryNotFoundError):
            raise UserError(f'The model "{repo}" has no recipe.yaml to train by.') from None
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise UserError(
            f'There is no recipe "{name}"; choose from {known}, name a YAML file, or a '
            "published model as hub:name/model."
        )
    return path


def _own_keys() -> set[str]:
    return {f.name for part in OWN for f in fields(part)}


def _check_keys(settings: dict) -> None:
    known = (_own_keys() | {f.name for f in fields(TrainingArguments)}) - {
        "output_dir",
        "remove_unused_columns",
        "logging_nan_inf_filter",
    }
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else "."
            raise UserError(f'Recipe has no key "{key}"{hint}')


def _check_values(recipe: Recipe) -> None:
    if not 0 < recipe.data.validation_size < 1:
        raise UserError(
            f"validation_size is {recipe.data.validation_size}; it is a share of the training "
            "split, between 0 and 1."
        )
    if recipe.model.attention not in ("auto", "sdpa", "eager"):
        raise UserError(f'attention is "{recipe.model.attention}"; choose auto, sdpa or eager.')
    if not 0 <= recipe.model.weight_average <= 0.5:
        raise UserError(
            f"weight_average is {recipe.model.weight_average}; it is a share of the steps, from 0 "
            "(off) to 0.5 (all of them alike)."
        )
    if recipe.data.streaming and recipe.training.max_steps <= 0:
        raise UserError(
            "A streamed dataset has no end: say how long to train, as ARGS=--max_steps=10000."
        )
    if recipe.data.streaming and recipe.training.ignore_data_skip:
        raise UserError("A stream goes on where it was: leave out ignore_data_skip.")
    if recipe.augmentation.crop_padding >= 1:
        raise UserError("crop_padding is a share of the image's side: give less than 1.")


def _join_values(arguments: list[str]) -> list[str]:
    """`--seed 1` as `--seed=1`; a lone `--flip` stays."""
    joined = []
    for argument in arguments:
        if argument.startswith("--") or not joined or "=" in joined[-1]:
            joined.append(argument)
        else:
            joined[-1] += f"={argument}"
    return joined


def _split_override(argument: str) -> tuple[str, str]:
    if not argument.startswith("--"):
        raise UserError(f'Cannot read "{argument}"; settings are given as --key=value.')
    key, _, value = argument[2:].partition("=")
    key = key.replace("-", "_")
    if key.startswith("no_") and not value:  # as argparse has it for what is on by default
        return key.removeprefix("no_"), "false"
    return key, value or "true"


def _plain(value):
    """An enum as its value, for YAML."""
    return getattr(value, "value", value)


def _as_argument(value) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
