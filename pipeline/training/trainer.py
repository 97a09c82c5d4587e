"""Fine-tune by a recipe: transformers' `Trainer`, subclassed where the stock one is wrong.

- Images are preprocessed in batches on the device, from uint8.
- Weights are restored strictly. The stock `Trainer` reads a checkpoint without converting its
  names and without checking, so that most of a ViT stays untrained after a resume or a
  best-checkpoint reload (transformers issues 43701 and 48805; the overrides can go when both
  are fixed).
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from pipeline import environment
from pipeline.averaging import WeightAverage
from pipeline.data import Batches, load_splits
from pipeline.errors import UserError
from pipeline.metrics import ImageClassification
from pipeline.model import build, build_processor, parameter_groups
from pipeline.preprocess import augment, mix, preprocess
from pipeline.recipe import INCIDENTAL, OWN_DEFAULTS, Recipe
from pipeline.streaming import ImageStream, Rows


def train(recipe: Recipe, restart: bool = False) -> dict:
    """Train, or go on from the last whole checkpoint; a finished run is left as it is.

    Leaves the best model in `models/<run>`, loadable by `transformers.pipeline`, with the
    recipe and the log of its training. Returns that log: see `_summary`. UserError for what
    the person can mend, before any training starts.
    """
    main = recipe.training.process_index == 0
    with recipe.training.main_process_first(desc="clearing"):
        if restart and main:
            shutil.rmtree(recipe.model_folder, ignore_errors=True)
            shutil.rmtree(recipe.checkpoint_folder, ignore_errors=True)
    _check_same_recipe(recipe)
    if (recipe.model_folder / "training.json").exists():
        return json.loads((recipe.model_folder / "training.json").read_text()) | {"new": False}

    revision = environment.code_revision()  # of the code that runs: files may change meanwhile
    trainer = prepare(recipe)
    checkpoint = last_checkpoint(recipe.checkpoint_folder)
    if checkpoint and recipe.data.streaming:
        trainer.train_dataset.resume(checkpoint)
    if main:
        recipe.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        recipe.save(recipe.checkpoint_folder)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    summary = _summary(trainer, recipe) | {"code_revision": revision}
    # Asked of all processes: each may hold a shard, and the main one gets the whole. The names
    # are without what torch.compile puts before them.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    if main:
        live = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        _save(live, weights, trainer.processing_class, recipe, summary)
    trainer.accelerator.wait_for_everyone()
    return summary | {"new": True}


def prepare(recipe: Recipe) -> "ImageTrainer":
    """The recipe's data decoded, its model built, ready to train. UserError as `train`."""
    if recipe.training.bf16 and not environment.fast_bfloat16():
        recipe.training.bf16, recipe.training.mixed_precision = False, "no"
        print("This processor is not made for bfloat16: training in float32.")
    processor = build_processor(recipe.model)
    learn, validation, labels = _datasets(recipe, processor.resample)
    set_seed(recipe.training.seed)  # the head's first weights
    return ImageTrainer(recipe, build(recipe.model, labels), processor, learn, validation)


class ImageTrainer(Trainer):
    """`Trainer` on uint8 images: `_prepare_inputs` brings a batch to the device and preprocesses
    it there; the loss takes soft labels; restoring is strict.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        processor,
        train: Dataset | ImageStream,
        validation: Dataset,
    ):
        self.recipe = recipe
        self.generator = torch.Generator(recipe.training.device)
        metric = ImageClassification(keep_in_memory=True)
        super().__init__(
            model=model,
            args=recipe.training,
            processing_class=processor,  # so that a checkpoint is a whole model
            data_collator=Batches.collate,
            train_dataset=train if isinstance(train, ImageStream) else Batches(train),
            eval_dataset=Batches(validation),
            compute_loss_func=self.loss,
            compute_metrics=lambda output: {
                name: value
                for name, value in metric.compute(
                    predictions=output.predictions, references=output.label_ids
                ).items()
                if name in ("accuracy", "nll")
            },
        )
        if self.is_fsdp_enabled:
            # Not the Embeddings: accelerate 1.15 shards the patch embedding in them afterwards, and
            # fails where what surrounds it is sharded already.
            layers = [name for name in model._no_split_modules if not name.endswith("Embeddings")]
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or layers
        self.average = None
        if recipe.model.weight_average:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise UserError(
                    "weight_average follows whole weights, and fsdp2 and deepspeed cut them: leave "
                    "it out, or choose LAUNCHER=ddp."
                )
            self.average = WeightAverage(model, recipe.model.weight_average)
            self.add_callback(self.average)
        self.remove_callback(ProgressCallback)
        if not recipe.training.disable_tqdm:
            self.add_callback(Progress())
        self.add_callback(WallClock())

    def get_train_dataloader(self) -> DataLoader:
        if not self.recipe.data.streaming:
            return super().get_train_dataloader()
        # Not prepared by accelerate: each process has batches of its own already.
        pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        return DataLoader(self.train_dataset, batch_size=None, pin_memory=pin)

    def _prepare_inputs(self, inputs: dict) -> dict:
        """uint8 (B, 3, H, W) and labels (B,) to what the model takes, on the device.

        In training, augmented, and with soft labels (B, C) where images are mixed.
        """
        images, labels = (
            inputs[name].to(self.args.device, non_blocking=True)
            for name in ("pixel_values", "labels")
        )
        if not self.model.training:
            return {"pixel_values": preprocess(images, self.processing_class), "labels": labels}
        how = self.recipe.augmentation
        # Drawn from the CPU's state, which checkpoints hold, and apart for each process.
        seed = int(torch.randint(2**62, ()).item()) + self.args.process_index
        generator = self.generator.manual_seed(seed)
        images = augment(images, how.flip, how.crop_padding, generator)
        images = preprocess(images, self.processing_class)
        if how.mixup or how.cutmix:
            classes = self.model.config.num_labels
            draws = torch.Generator().manual_seed(seed ^ 2**62)  # asks nothing of the device
            images, labels = mix(images, labels, classes, how.mixup, how.cutmix, draws)
        return {"pixel_values": images, "labels": labels}

    def loss(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """Cross-entropy over the images of all processes and accumulated batches.

        Labels are class numbers (B,) or shares (B, C). Smoothed in training only: a
        validation loss is comparable across recipes.
        """
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        total = F.cross_entropy(
            outputs["logits"].float(), labels, label_smoothing=smoothing, reduction="sum"
        )
        return total / (num_items_in_batch if num_items_in_batch is not None else len(labels))

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

    def _averaged(self) -> contextlib.AbstractContextManager:
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        with self._averaged():
            super()._save(output_dir, state_dict)
        if self.average and self.args.should_save:  # called in every process
            self.average.save_live(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they restore by themselves
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore(self.model, resume_from_checkpoint)
        if self.average:
            self.average.resume(resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        restore(self.model, self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.recipe.data.streaming:
            batches = self.state.global_step * self.args.gradient_accumulation_steps
            self.train_dataset.save(Path(output_dir), batches)
        # trainer_state.json comes next, and says that the checkpoint is whole: so each process's
        # part must be there.
        self.accelerator.wait_for_everyone()

    def floating_point_ops(self, inputs):
        return 0  # the stock estimate counts pixels as tokens


class Progress(ProgressCallback):
    """The stock progress bar, with a line a person can read at each log."""

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
    """Adds `wall_s` to each log entry: seconds of training so far, earlier sittings included."""

    def on_train_begin(self, args, state, control, **kwargs):
        before = max((entry.get("wall_s", 0) for entry in state.log_history), default=0)
        self.start = time.monotonic() - before

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["wall_s"] = round(time.monotonic() - self.start, 1)


def restore(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Put a checkpoint's weights into the live model, every one of them or none."""
    saved = type(model).from_pretrained(checkpoint, dtype=torch.float32)
    model.load_state_dict(saved.state_dict(), strict=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; half-written ones are skipped, with a word each."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for checkpoint in reversed(found):
        if _is_whole(checkpoint):
            return checkpoint
        print(f"Skipping {checkpoint}: it was not written to its end.")
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        # Written last, so that what it needs was written before.
        json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "model.safetensors", "pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    # The optimizer's state: as the Trainer writes it, FSDP, DeepSpeed (with the scheduler's).
    return any((checkpoint / name).exists() for name in ("optimizer.pt", "optimizer.bin", "latest"))


def _check_same_recipe(recipe: Recipe) -> None:
    for folder in (recipe.model_folder, recipe.checkpoint_folder):
        file = folder / "recipe.yaml"
        if not file.exists():
            continue
        # Keys that are younger than the file had their default.
        before, now = OWN_DEFAULTS | yaml.safe_load(file.read_text()), recipe.settings
        keys = (before.keys() | now.keys()) - INCIDENTAL
        differing = [k for k in keys if before.get(k) != now.get(k)]
        if differing:
            shown = "; ".join(
                f"{k} is {now.get(k)} now, {before.get(k)} there" for k in sorted(differing)[:3]
            )
            raise UserError(
                f"{folder} holds a run of another recipe ({shown}). Name this run with "
                "ARGS=--run=NAME, or replace that one with ARGS=--restart."
            )


def _datasets(recipe: Recipe, resample: int) -> tuple[Dataset | ImageStream, Dataset, list[str]]:
    """What to learn from, what to validate on, and the names of the classes."""
    size, how = recipe.model.image_size, recipe.training
    if not recipe.data.streaming:
        with how.main_process_first(desc="decoding"):
            splits = load_splits(recipe.data, size, resample)
        return splits["train"], splits["validation"], splits["train"].features["label"].names
    rows = Rows(recipe.data, recipe.data.train_split)
    stream = ImageStream(
        rows,
        how.per_device_train_batch_size,
        size,
        resample,
        how.seed if how.data_seed is None else how.data_seed,
        how.process_index,
        how.world_size,
        recipe.data.num_proc,
    )
    return stream, load_splits(recipe.data, size, resample, "validation")["validation"], rows.names


def _summary(trainer: ImageTrainer, recipe: Recipe) -> dict:
    history = trainer.state.log_history
    last = next(entry for entry in reversed(history) if "train_runtime" in entry)
    return {
        "run": recipe.run,
        "model_folder": str(recipe.model_folder),
        "best_step": trainer.state.best_global_step,
        "validation_accuracy": trainer.state.best_metric,
        "validation_images": len(trainer.eval_dataset),
        "training_images": _images(trainer),
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "wall_s": last["wall_s"],
        "processes": trainer.args.world_size,
        "precision": trainer.args.mixed_precision,
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        "log": history,
    }


def _images(trainer: ImageTrainer) -> int:
    """How many there are to learn from; of a stream, how many were seen."""
    if isinstance(trainer.train_dataset, ImageStream):
        return trainer.state.global_step * trainer.get_total_train_batch_size(trainer.args)
    return len(trainer.train_dataset)


def _save(model: PreTrainedModel, weights: dict, processor, recipe: Recipe, summary: dict) -> None:
    """The folder appears whole or not at all."""
    part = recipe.model_folder.with_name(recipe.run + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, state_dict=weights)
    processor.save_pretrained(part)
    recipe.save(part)
    (part / "training.json").write_text(json.dumps(summary, indent=1))
    part.rename(recipe.model_folder)
