"""Fine-tune by a recipe with transformers' `Trainer`, overridden where the stock one is wrong."""

import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from pipeline import runs
from pipeline.data.decoding import DecodedImages
from pipeline.data.loading import load_split, load_splits, load_stream
from pipeline.data.streaming import ImageStream
from pipeline.data.transforms import augment, mix, preprocess
from pipeline.errors import UserError
from pipeline.evaluation.metrics import ImageClassification
from pipeline.recipe import Recipe
from pipeline.training.checkpoints import check_same_recipe, last_checkpoint, restore
from pipeline.training.model import build_model, build_processor
from pipeline.training.optimizer import parameter_groups


def train(recipe: Recipe, restart: bool = False) -> dict:
    """Train a run, or resume it from its last complete checkpoint; a finished run is left alone.

    Leaves the best model in `models/<run>`, loadable by `transformers.pipeline`, with its recipe
    and `training.json`.

    Args:
        recipe: What to train, and how.
        restart: Train again from the start, and replace what is there.

    Returns:
        The content of `training.json`, and `new`: whether anything was trained.

    Raises:
        UserError: The data, the model or the recipe can't be used; before training starts.
    """
    is_main = recipe.training.process_index == 0
    with recipe.training.main_process_first(desc="clearing"):
        if restart and is_main:
            runs.remove_run(recipe.run)
    check_same_recipe(recipe)
    summary = runs.read_json(recipe.model_folder / "training.json")
    if summary:
        return summary | {"new": False}

    revision = runs.code_revision()  # of the code that runs: files may change meanwhile
    trainer = build_trainer(recipe)
    checkpoint = last_checkpoint(recipe.checkpoint_folder)
    if checkpoint and recipe.data.streaming:
        trainer.train_dataset.resume(checkpoint)
    if is_main:
        recipe.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        recipe.save(recipe.checkpoint_folder)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    summary = _summarize(trainer, recipe) | {"code_revision": revision}
    # Asked of all processes, since each may hold a shard; the names without torch.compile's prefix.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    if is_main:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        _save_run(model, weights, trainer.processing_class, recipe, summary)
    trainer.accelerator.wait_for_everyone()
    return summary | {"new": True}


def build_trainer(recipe: Recipe) -> "ImageTrainer":
    """Decode the recipe's data and build its model, ready to train. UserError as `train`."""
    args, data, size = recipe.training, recipe.data, recipe.model.image_size
    if args.bf16 and not runs.has_fast_bfloat16():
        args.bf16, args.mixed_precision = False, "no"
        print("This processor emulates bfloat16: training in float32.")
    processor = build_processor(recipe.model)
    if data.streaming:
        rows = load_stream(data, "train")
        seed = args.seed if args.data_seed is None else args.data_seed
        train_set = ImageStream(
            rows, args.per_device_train_batch_size, size, processor.resample,
            seed, args.process_index, args.world_size, data.num_proc,
        )  # fmt: skip
        labels, validation = rows.names, load_split(data, "validation", size, processor.resample)
    else:
        with args.main_process_first(desc="decoding"):
            splits = load_splits(data, size, processor.resample, "train", "validation")
        train_set, validation = splits["train"], splits["validation"]
        labels = train_set.features["label"].names
    set_seed(args.seed)  # the head's first weights
    model = build_model(recipe.model, labels)
    return ImageTrainer(recipe, model, processor, train_set, validation)


class ImageTrainer(Trainer):
    """transformers' `Trainer` for uint8 images. What is overridden, and when that can go:

    - `_prepare_inputs` preprocesses whole batches on the device: stays.
    - `compute_loss_func` takes soft labels, and averages over all processes: stays.
    - `_load_from_checkpoint`, `_load_best_model` restore every weight: the stock ones read a
      checkpoint without converting its names and leave most of a ViT untrained (transformers
      issues 43701 and 48805). They can go when both are fixed; a test fails then.
    - `create_optimizer` builds groups for layer-wise decay: stays.
    - `get_train_dataloader`, `_save_rng_state` for streams: they can go when accelerate leaves
      batches of an IterableDataset alone and saves its state.
    - `floating_point_ops`: the stock estimate takes pixels for tokens.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        processor,
        train_set: Dataset | ImageStream,
        validation: Dataset,
    ):
        self.metric = ImageClassification(keep_in_memory=True)
        self.recipe = recipe
        self.generator = torch.Generator(recipe.training.device)
        is_stream = isinstance(train_set, ImageStream)
        super().__init__(
            model=model,
            args=recipe.training,
            processing_class=processor,  # so that a checkpoint is a complete model
            data_collator=DecodedImages.collate,
            train_dataset=train_set if is_stream else DecodedImages(train_set),
            eval_dataset=DecodedImages(validation),
            compute_loss_func=self.loss,
            compute_metrics=self.validation_metrics,
        )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not self.is_fsdp_enabled:
            # accelerate 1.15 would train whole copies without a warning.
            raise UserError(
                "fsdp2 shards over accelerators, and this host has none: use LAUNCHER=ddp."
            )
        if self.is_fsdp_enabled:
            # Not the embeddings: accelerate 1.15 shards the patch embedding in them afterwards, and
            # fails if the module around it is sharded already.
            layers = [name for name in model._no_split_modules if not name.endswith("Embeddings")]
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or layers
        self.remove_callback(ProgressCallback)
        if not recipe.training.disable_tqdm:
            self.add_callback(ProgressLines())
        self.add_callback(WallClock())

    def get_train_dataloader(self) -> DataLoader:
        if not self.recipe.data.streaming:
            return super().get_train_dataloader()
        # Not prepared by accelerate: each process has batches of its own already.
        pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        return DataLoader(self.train_dataset, batch_size=None, pin_memory=pin)

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Bring uint8 (B, 3, H, W) and labels (B,) to the device, and preprocess them there.

        In training they are augmented, and the labels are soft, (B, C), where images are mixed.
        """
        images, labels = (
            inputs[name].to(self.args.device, non_blocking=True)
            for name in ("pixel_values", "labels")
        )
        if not self.model.training:
            return {"pixel_values": preprocess(images, self.processing_class), "labels": labels}
        options = self.recipe.augmentation
        # Drawn from the CPU's state, which checkpoints hold, and different in each process.
        seed = int(torch.randint(2**62, ()).item()) + self.args.process_index
        generator = self.generator.manual_seed(seed)
        images = augment(images, options.horizontal_flip, options.random_crop_padding, generator)
        images = preprocess(images, self.processing_class)
        if options.mixup or options.cutmix:
            classes = self.model.config.num_labels
            draws = torch.Generator().manual_seed(seed ^ 2**62)  # on the CPU: the device goes on
            images, labels = mix(images, labels, classes, options.mixup, options.cutmix, draws)
        return {"pixel_values": images, "labels": labels}

    def loss(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """Return the cross-entropy over the images of all processes and accumulated batches.

        Labels are class numbers (B,) or soft (B, C). They are smoothed in training only, so that
        a validation loss is comparable across recipes.
        """
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        total = F.cross_entropy(
            outputs["logits"].float(), labels, label_smoothing=smoothing, reduction="sum"
        )
        return total / (num_items_in_batch if num_items_in_batch is not None else len(labels))

    def validation_metrics(self, output) -> dict[str, float]:
        """Return accuracy and nll of an EvalPrediction of logits (N, C) and labels (N,)."""
        scores = self.metric.compute(predictions=output.predictions, references=output.label_ids)
        return {name: scores[name] for name in ("accuracy", "nll")}

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = parameter_groups(
                self.model if model is None else model,
                self.args.learning_rate,
                self.args.weight_decay,
                self.recipe.model.layer_decay,
            )
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they restore by themselves
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore(self.model, resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        restore(self.model, self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.recipe.data.streaming:
            self.train_dataset.save(Path(output_dir))
        # trainer_state.json comes next, and says that the checkpoint is complete: so each process's
        # part must be there.
        self.accelerator.wait_for_everyone()

    def floating_point_ops(self, inputs):
        return 0


class ProgressLines(ProgressCallback):
    """The stock progress bar, with a readable line at each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "eval_accuracy" in logs:
            text = f"validation accuracy {logs['eval_accuracy']:.2%}, nll {logs['eval_nll']:.4f}"
        elif "loss" in logs:
            text = f"loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.2e}"
        else:
            return
        self.training_bar.write(f"epoch {logs['epoch']:.2f}  {text}")


class WallClock(TrainerCallback):
    """Adds `wall_s` to each log entry: seconds of training so far, before a resume included."""

    def on_train_begin(self, args, state, control, **kwargs):
        before = max((entry.get("wall_s", 0) for entry in state.log_history), default=0)
        self.start = time.monotonic() - before

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["wall_s"] = round(time.monotonic() - self.start, 1)


def _summarize(trainer: ImageTrainer, recipe: Recipe) -> dict:
    state, history = trainer.state, trainer.state.log_history
    last = next(entry for entry in reversed(history) if "train_runtime" in entry)
    best = next((e for e in history if "eval_nll" in e and e["step"] == state.best_global_step), {})
    if recipe.data.streaming:  # how many were seen
        images = state.global_step * trainer.get_total_train_batch_size(trainer.args)
    else:
        images = len(trainer.train_dataset)
    return {
        "run": recipe.run,
        "model_folder": str(recipe.model_folder),
        "best_step": state.best_global_step,
        "validation_accuracy": best.get("eval_accuracy"),
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
    """The folder appears complete or not at all."""
    part = recipe.model_folder.with_name(recipe.run + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, state_dict=weights)
    processor.save_pretrained(part)
    recipe.save(part)
    runs.write_json(part / "training.json", summary)
    part.rename(recipe.model_folder)
