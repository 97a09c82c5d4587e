"""transformers' `Trainer` for images, overridden where the original is unsuitable."""

import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer
from transformers.trainer_callback import ProgressCallback

from pipeline.data.decoding import DecodedImages
from pipeline.data.streaming import ImageStream
from pipeline.data.transforms import augment, mix, preprocess
from pipeline.errors import UserError
from pipeline.evaluation.metrics import ImageClassification
from pipeline.recipe import Recipe
from pipeline.recipe_checks import METRICS
from pipeline.runs import print_once
from pipeline.training.callbacks import ProgressLines, StopOnDivergence, StopOnSignal, WallClock
from pipeline.training.checkpoints import restore
from pipeline.training.config import training_sizes
from pipeline.training.linear_probe import fit_head
from pipeline.training.model import size_options
from pipeline.training.optimizer import parameter_groups


class ImageTrainer(Trainer):
    """The `Trainer` of transformers for uint8 images.

    Overridden methods, and when each override can be removed:

    - `_prepare_inputs` preprocesses whole batches on the device: permanent.
    - `compute_loss_func` takes soft labels and averages over all processes: permanent.
    - `_load_from_checkpoint`, `_load_best_model` restore every weight. The originals read a
      checkpoint without converting its names and leave most of a ViT untrained (transformers
      issues 43701 and 48805). Remove them when both are fixed; a test then fails.
    - `train` fits the head first, if the recipe says so: permanent.
    - `create_optimizer` builds groups for layer-wise decay: permanent.
    - `get_train_dataloader`, `_save_rng_state` handle streams. Remove them when accelerate passes
      batches of an IterableDataset through and saves its state.
    - `floating_point_ops`: the original estimate counts pixels as tokens.
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
            processing_class=processor,  # makes each checkpoint a complete model
            data_collator=DecodedImages.collate,
            train_dataset=train_set if is_stream else DecodedImages(train_set),
            eval_dataset=DecodedImages(validation),
            compute_loss_func=self.loss,
            compute_metrics=self.validation_metrics,
        )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not self.is_fsdp_enabled:
            # accelerate 1.15 would train unsharded copies without a warning.
            raise UserError(
                "fsdp2 shards over accelerators, but this host has none: use LAUNCHER=ddp."
            )
        if self.is_fsdp_enabled:
            # Without the embeddings: accelerate 1.15 shards their patch embedding afterwards, and
            # fails if the enclosing module is already sharded.
            layers = [name for name in model._no_split_modules if not name.endswith("Embeddings")]
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or layers
        self.class_weights = self._class_weights(train_set)
        self.stop_on_signal = StopOnSignal(self.accelerator)
        self.remove_callback(ProgressCallback)
        self.wall_clock = WallClock()
        callbacks = [self.wall_clock, StopOnDivergence(), self.stop_on_signal]
        if not recipe.training.disable_tqdm:
            callbacks.append(ProgressLines())
        if patience := recipe.objective.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(patience))
        for callback in callbacks:
            self.add_callback(callback)

    def train(self, resume_from_checkpoint=None, **options):
        self.wall_clock.start = time.monotonic()
        count, size = self.recipe.model.linear_probe_samples, training_sizes(self.recipe.model)[0]
        if count and not resume_from_checkpoint:
            device = self.model.device
            model = self.model.to(self.args.device)  # FSDP and DeepSpeed move it later
            correct = fit_head(model, self.processing_class, self.train_dataset, count, size)
            model.to(device)
            print_once(f"Fitted the head to training images; {correct:.1%} of them are correct.")
        return super().train(resume_from_checkpoint, **options)

    def get_train_dataloader(self) -> DataLoader:
        if not self.recipe.data.streaming:
            return super().get_train_dataloader()
        # Not prepared by accelerate: each process already has its own batches.
        pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        return DataLoader(self.train_dataset, batch_size=None, pin_memory=pin)

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Move uint8 (B, 3, H, W) and labels (B,) to the device, and preprocess them there.

        In training, images are augmented; if they are mixed, the labels are soft, (B, C).
        """
        images, labels = (
            inputs[name].to(self.args.device, non_blocking=True)
            for name in ("pixel_values", "labels")
        )
        if not self.model.training:
            return {"pixel_values": preprocess(images, self.processing_class), "labels": labels}
        size = self.training_size()
        options = self.recipe.augmentation
        # Drawn from the CPU's RNG state, which checkpoints save, and different in each process.
        seed = int(torch.randint(2**62, ()).item()) + self.args.process_index
        generator = self.generator.manual_seed(seed)
        images = augment(images, options.horizontal_flip, options.random_crop_padding, generator)
        images = preprocess(images, self.processing_class, size)
        if options.mixup or options.cutmix:
            classes = self.model.config.num_labels
            draws = torch.Generator().manual_seed(seed ^ 2**62)  # on the CPU: no device sync
            images, labels = mix(images, labels, classes, options.mixup, options.cutmix, draws)
        return {"pixel_values": images, "labels": labels} | size_options(self.model, size)

    def progress(self) -> float:
        """Return the share of steps done, from 0 to 1."""
        return self.state.global_step / self.state.max_steps

    def training_size(self) -> int:
        """Return the image size, in pixels, of the next step."""
        options, done = self.recipe.model, self.progress()
        schedule = options.image_size_schedule or {"0": options.image_size}
        return next(size for share, size in reversed(schedule.items()) if float(share) <= done)

    def loss(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """Return the cross-entropy over the images of all processes and accumulated batches.

        Labels are class numbers (B,) or soft (B, C). Smoothing and class weights apply only in
        training, so that validation losses are comparable across recipes.
        """
        logits, options = outputs["logits"].float(), {}
        if self.model.training:
            options["label_smoothing"] = self.args.label_smoothing_factor
            if self.class_weights is not None:
                options["weight"] = self.class_weights.to(logits.device)
        total = F.cross_entropy(logits, labels, reduction="sum", **options)
        return total / (num_items_in_batch if num_items_in_batch is not None else len(labels))

    def _class_weights(self, train_set: Dataset | ImageStream) -> torch.Tensor | None:
        """Return each class's weight in the loss, (C,); balanced ones average 1 over the images."""
        weights, names = self.recipe.objective.class_weights, self.model.config.label2id
        if weights is None:
            return None
        if weights == "balanced":
            labels = np.asarray(train_set["label"][:])
            present, balanced = np.unique(labels), torch.zeros(len(names))
            shares = compute_class_weight("balanced", classes=present, y=labels)
            balanced[present] = torch.tensor(shares).float()
            return balanced
        if unknown := sorted(weights.keys() - names.keys()):
            raise UserError(
                f'class_weights names an unknown class "{unknown[0]}"; use {", ".join(names)}.'
            )
        return torch.tensor([float(weights.get(name, 1.0)) for name in names])

    def validation_metrics(self, output) -> dict[str, float]:
        """Return the scalar metrics for an EvalPrediction of logits (N, C) and labels (N,)."""
        scores = self.metric.compute(predictions=output.predictions, references=output.label_ids)
        return {name: scores[name] for name in METRICS if name in scores}

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
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they restore the weights themselves
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
        # trainer_state.json is written next and marks the checkpoint as complete, so wait until
        # every process has saved its part.
        self.accelerator.wait_for_everyone()

    def floating_point_ops(self, inputs):
        return 0
