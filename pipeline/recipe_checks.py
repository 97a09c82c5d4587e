"""Check a recipe's keys and values before anything is loaded. Each error names the key."""

import difflib
import math
from dataclasses import fields

from transformers import AutoConfig, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from pipeline.errors import UserError

RENAMED_KEYS = {
    "flip": "horizontal_flip",
    "crop_padding": "random_crop_padding",
    "drop_path": "drop_path_rate",
}
# Names that other tools use.
ALIASES = {
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "label_smoothing": "label_smoothing_factor",
    "patience": "early_stopping_patience",
}
# Set by the pipeline itself; the reasons are given where they are set.
FIXED_KEYS = {
    "output_dir", "remove_unused_columns", "logging_nan_inf_filter", "prediction_loss_only",
    "resume_from_checkpoint", "restore_callback_states_from_checkpoint", "save_only_model",
}  # fmt: skip
# Training keys that a recipe from the Hub may set: none that affects this machine or the Hub.
HUB_TRAINING_KEYS = {
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "optim", "label_smoothing_factor", "bf16", "fp16", "seed", "data_seed", "eval_strategy",
    "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "gradient_checkpointing",
}  # fmt: skip
# Settings of speed, hardware and reporting: a run may be resumed with other values.
NON_SEMANTIC_KEYS = {
    "num_proc", "attention", "logging_steps", "save_total_limit", "disable_tqdm", "report_to",
    "torch_compile", "per_device_eval_batch_size", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id",
}  # fmt: skip
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "nll", "loss")
LOWER_IS_BETTER = ("nll", "loss")
# Required ranges of values: the range in words, the check, the keys.
RANGES = {
    "at least 1": (
        lambda value: value >= 1,
        ("image_size", "max_train_samples", "num_proc", "early_stopping_patience",
         "per_device_train_batch_size", "per_device_eval_batch_size",
         "gradient_accumulation_steps"),
    ),
    "more than 0": (
        lambda value: value > 0,
        ("num_train_epochs", "learning_rate", "adam_epsilon", "eval_steps", "save_steps",
         "logging_steps"),
    ),
    "0 or more": (
        lambda value: value >= 0,
        ("mixup", "cutmix", "weight_decay", "warmup_steps", "max_grad_norm", "seed",
         "linear_probe_samples"),
    ),
    "from 0 to less than 1": (
        lambda value: 0 <= value < 1,
        ("random_crop_padding", "drop_path_rate", "label_smoothing_factor", "adam_beta1",
         "adam_beta2"),
    ),
    "more than 0 and at most 1": (lambda value: 0 < value <= 1, ("layer_decay",)),
    "between 0 and 1": (lambda value: 0 < value < 1, ("validation_size",)),
}  # fmt: skip
CHOICES = {"attention": ("auto", "sdpa", "eager"), "resize": ("squash", "crop")}


def check_keys(keys: list[str], own_keys: set[str], from_hub: bool = False) -> None:
    """Raise UserError for a key that is unknown or renamed, or that a recipe may not set."""
    training_keys = {key.name for key in fields(TrainingArguments)} - FIXED_KEYS
    known = own_keys | training_keys
    for key in keys:
        if key in RENAMED_KEYS:
            raise UserError(f'The recipe key "{key}" is now "{RENAMED_KEYS[key]}".')
        if key.startswith(("hub_", "push_to_hub")):
            raise UserError(
                f'A recipe can\'t set "{key}": the Trainer would publish unverified weights. '
                "Use `make push`."
            )
        if key in FIXED_KEYS:
            raise UserError(f'A recipe can\'t set "{key}": this pipeline sets it.')
        if key not in known:
            near = [ALIASES[key]] if key in ALIASES else difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else "."
            raise UserError(f'Recipe has no key "{key}"{hint}')
        if from_hub and key not in own_keys | HUB_TRAINING_KEYS:
            raise UserError(
                f'A recipe from the Hub can\'t set "{key}": set it on the command line if you '
                "want it."
            )


def check_values(recipe) -> None:
    """Raise UserError for a value out of range, or for values that contradict each other."""
    data, model, objective, args = recipe.data, recipe.model, recipe.objective, recipe.training
    groups = (data, model, recipe.augmentation, objective, args)
    values = {key.name: getattr(group, key.name) for group in groups for key in fields(group)}
    for words, (is_valid, keys) in RANGES.items():
        for key in keys:
            if values[key] is not None and not is_valid(values[key]):
                raise UserError(f"{key} is {values[key]}; it must be {words}.")
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise UserError(f'{key} is "{values[key]}"; choose {" or ".join(choices)}.')
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if metric not in METRICS:
        raise UserError(f'metric_for_best_model is "{metric}"; choose from {", ".join(METRICS)}.')
    for name in args.report_to:
        if name not in [*get_available_reporting_integrations(), "flyte"]:  # which it leaves out
            raise UserError(
                f'report_to is "{name}", which is not available: install its package, such as '
                f"`.venv/bin/pip install {name}`, or remove report_to."
            )
    if objective.early_stopping_patience and not args.load_best_model_at_end:
        raise UserError("early_stopping_patience needs load_best_model_at_end: true.")
    in_steps = args.load_best_model_at_end and args.eval_strategy == args.save_strategy == "steps"
    is_new = not recipe.checkpoint_folder.exists()  # runs of earlier versions can be resumed
    if in_steps and is_new and args.save_steps != args.eval_steps:
        raise UserError(
            f"save_steps is {args.save_steps} and eval_steps {args.eval_steps}: make them equal, "
            "so that the best weights are saved."
        )
    _check_class_weights(objective.class_weights)
    if model.image_size_schedule is not None:
        _check_schedule(model.image_size_schedule, model.image_size)
    if data.streaming:
        _check_streaming(model, objective, args)
    if model.model_config is not None:
        _check_model_config(model.model_config)


def _check_class_weights(weights) -> None:
    values = weights.values() if isinstance(weights, dict) else [] if weights is None else [weights]
    if weights != "balanced" and not all(
        type(value) in (int, float) and 0 <= value < math.inf and isinstance(weights, dict)
        for value in values
    ):
        raise UserError(
            f"class_weights is {weights}; use balanced, or a weight of 0 or more for each class "
            "name, such as {cat: 2.0}."
        )


def _check_schedule(schedule: dict, image_size: int) -> None:
    try:
        shares, sizes = [float(share) for share in schedule], list(schedule.values())
    except (AttributeError, TypeError, ValueError):
        shares, sizes = [], []
    is_valid = all(type(size) is int and size > 0 for size in sizes)
    if not is_valid or shares[:1] != [0] or shares != sorted(shares) or shares[-1] >= 1:
        raise UserError(
            f"image_size_schedule is {schedule}; map the share of steps at which each size begins, "
            "increasing from 0, to the size in pixels, such as {0: 56, 0.5: 98}."
        )
    if sizes[-1] != image_size:
        raise UserError(
            f"image_size_schedule ends at {sizes[-1]} pixels, but image_size, the size that the "
            f"saved model takes, is {image_size}: make them equal, or train only at {image_size} "
            "pixels with --image_size_schedule=null."
        )


def _check_streaming(model, objective, args: TrainingArguments) -> None:
    if args.max_steps <= 0:
        raise UserError(
            "A streamed dataset has no end: set the number of steps, as in ARGS=--max_steps=10000."
        )
    if args.ignore_data_skip:
        raise UserError("A resumed stream reads no image twice: remove ignore_data_skip.")
    if model.linear_probe_samples:
        raise UserError("A stream is read only once: set --linear_probe_samples=0.")
    if objective.class_weights == "balanced":
        raise UserError(
            "class_weights: balanced needs to count all labels, which is impossible for a stream: "
            "set a weight for each class name."
        )


def _check_model_config(settings: dict) -> None:
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING_NAMES, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else "."
        raise UserError(f'model_config has an unknown model_type, "{kind}"{hint}')
    known = AutoConfig.for_model(kind).to_dict().keys()
    for key in settings.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else "."
        raise UserError(f'model_config has no key "{key}" for a {kind}{hint}')
