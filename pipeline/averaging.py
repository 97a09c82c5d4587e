"""A running average of the weights, scored and saved in their place.

Polyak & Juditsky 1992; weighted towards the end by polynomial decay, Shamir & Zhang 2013
(arXiv:1212.1824), so that it neither remembers the first steps nor needs to know the last.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback

LIVE = "live.safetensors"  # beside model.safetensors, which holds the average


class WeightAverage(TrainerCallback):
    """Follows the weights of `model` while it is trained, and takes their place where asked.

    `width` in (0, 0.5] is the mean age of what is averaged, as a share of the steps so far: 0.5
    is the plain mean of all of them. Integer buffers are the last ones, not averaged.
    """

    def __init__(self, model: PreTrainedModel, width: float):
        self.model = model
        self.power = 1 / width - 2  # step t weighs t ** power, about
        self.average = [tensor.clone() for tensor in self.live]

    @property
    def live(self) -> list[torch.Tensor]:
        """The model's own tensors, asked for anew each time: accelerate may replace them."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]

    def on_step_end(self, args, state, control, **kwargs):
        newest = (self.power + 1) / (state.global_step + self.power)  # 1 at the first step
        get_ema_multi_avg_fn(1 - newest)(self.average, self.live, None)

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint:
            _copy(self.live, self.average)  # the best is an average, and was just loaded
        else:
            _copy(self.average, self.live)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the average."""
        kept = [tensor.clone() for tensor in self.live]
        _copy(self.average, self.live)
        try:
            yield
        finally:
            _copy(kept, self.live)

    def save_live(self, checkpoint: str | os.PathLike) -> None:
        save_model(self.model, str(Path(checkpoint, LIVE)))

    def resume(self, checkpoint: str | os.PathLike) -> None:
        """Go on from a checkpoint whose average the model holds already."""
        _copy(self.live, self.average)
        load_model(self.model, str(Path(checkpoint, LIVE)))


def _copy(source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
    for new, old in zip(source, target, strict=True):
        old.copy_(new)
