"""Train or resume a run as its recipe says, and save its best model."""

import shutil
from contextlib import nullcontext
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from pipeline import runs
from pipeline.data.loading import fingerprint, load_split, load_splits, load_stream
from pipeline.data.streaming import ImageStream
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.training.checkpoints import (
    check_same_recipe,
    check_same_setup,
    last_checkpoint,
    lock_run,
    save_setup,
)
from pipeline.training.model import build_model, build_processor
from pipeline.training.trainer import ImageTrainer


def train(recipe: Recipe, restart: bool = False) -> dict:
    """Train a run, or resume it from its last complete checkpoint; skip a finished run.

    Saves the best model to `models/<run>`, loadable by `transformers.pipeline`, with its recipe
    and `training.json`.

    Args:
        recipe: What to train, and how.
        restart: Train again from the start and replace the existing run.

    Returns:
        The content of `training.json`, and `new`: whether anything was trained.

    Raises:
        UserError: The data, the model or the recipe can't be used. Raised before training starts.
    """
    is_main = recipe.training.process_index == 0
    with lock_run(recipe) if is_main else nullcontext():
        runs.check_folders(recipe.run)
        recipe.pin_sources(resume=not restart)
        if not restart:
            check_same_recipe(recipe)
            summary = runs.read_json(recipe.model_folder / "training.json")
            if summary:
                return summary | {"new": False}
        return _train(recipe, restart, is_main) | {"new": True}


def _train(recipe: Recipe, restart: bool, is_main: bool) -> dict:
    revision = runs.code_revision()  # read now: files may change during training
    trainer = build_trainer(recipe)
    with recipe.training.main_process_first(desc="hashing"):
        data = fingerprint(recipe.data)
    if restart and is_main:
        runs.remove_run(recipe.run)
    trainer.accelerator.wait_for_everyone()
    checkpoint = last_checkpoint(recipe.checkpoint_folder)
    if checkpoint:
        check_same_setup(recipe, data)
        if recipe.data.streaming:
            trainer.train_dataset.resume(checkpoint)
    if is_main:
        recipe.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        recipe.save(recipe.checkpoint_folder)
        save_setup(recipe, data)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    state = trainer.state
    if trainer.stop_on_signal.stopped:
        raise UserError(
            f"Stopped by a signal at step {state.global_step} of {state.max_steps}. "
            "A checkpoint was saved: run the same command to resume."
        )
    summary = _summarize(trainer, recipe) | {"code_revision": revision, "data": data}
    # Called in all processes, since each may hold a shard. Strip torch.compile's prefix.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    if is_main:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        _save_run(model, weights, trainer.processing_class, recipe, summary)
    trainer.accelerator.wait_for_everyone()
    return summary


def build_trainer(recipe: Recipe) -> ImageTrainer:
    """Decode the recipe's data and build its model, ready to train. Raises as `train` does."""
    args, data = recipe.training, recipe.data
    if args.n_gpu > 1:  # the Trainer would use DataParallel, and scale our loss
        raise UserError(
            f"This host has {args.n_gpu} GPUs, and one process uses one: start NPROC={args.n_gpu} "
            "processes, or choose a GPU with CUDA_VISIBLE_DEVICES=0."
        )
    if args.bf16 and not runs.has_fast_bfloat16():
        args.bf16, args.mixed_precision = False, "no"
        print("This machine only emulates bfloat16: training in float32.")
    processor = build_processor(recipe.model)
    if data.streaming:
        rows = load_stream(data, "train")
        seed = args.seed if args.data_seed is None else args.data_seed
        train_set = ImageStream(
            rows, args.per_device_train_batch_size, processor, seed,
            args.process_index, args.world_size, data.num_proc, data.skip_corrupt,
        )  # fmt: skip
        labels = rows.features["label"].names
        validation = load_split(data, "validation", processor)
    else:
        with args.main_process_first(desc="decoding"):
            splits = load_splits(data, processor, "train", "validation")
        train_set, validation = splits["train"], splits["validation"]
        labels = train_set.features["label"].names
    set_seed(args.seed)  # for the head's initial weights
    model = build_model(recipe.model, labels)
    return ImageTrainer(recipe, model, processor, train_set, validation)


def _summarize(trainer: ImageTrainer, recipe: Recipe) -> dict:
    state, history = trainer.state, trainer.state.log_history
    last = next(entry for entry in reversed(history) if "train_runtime" in entry)
    step = state.global_step  # the step whose weights are saved
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        step = int(Path(state.best_model_checkpoint).name.split("-")[1])
    saved = next((e for e in history if "eval_nll" in e and e["step"] == step), {})
    if recipe.data.streaming:  # the number of images seen
        images = state.global_step * trainer.get_total_train_batch_size(trainer.args)
    else:
        images = len(trainer.train_dataset)
    return {
        "run": recipe.run,
        "dashboard": trainer.args.trackio_space_id,  # linked in the card if it is public
        "model_folder": str(recipe.model_folder),
        "best_step": step,
        "validation_accuracy": saved.get("eval_accuracy"),
        "validation_images": len(trainer.eval_dataset),
        "training_images": images,
        "epochs": state.epoch,
        "steps": state.global_step,
        "wall_s": last["wall_s"],
        "processes": trainer.args.world_size,
        "precision": trainer.args.mixed_precision,
        "hardware": runs.hardware(),
        "versions": runs.versions(),
        "log": history,
    }


def _save_run(
    model: PreTrainedModel, weights: dict, processor, recipe: Recipe, summary: dict
) -> None:
    """Save the model folder atomically: it appears complete or not at all."""
    part = recipe.model_folder.with_name(recipe.run + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, state_dict=weights)
    processor.save_pretrained(part)
    recipe.save(part)
    runs.write_json(part / "training.json", summary)
    part.rename(recipe.model_folder)
