"""Compute a model's outputs for a decoded dataset: logits, and the features of a layer."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pipeline.data.decoding import DecodedImages
from pipeline.data.transforms import preprocess


def predict(
    model: PreTrainedModel, processor, dataset: Dataset, batch_size: int = 128, bf16: bool = False,
    depth: float | None = None, transform: Callable[[Tensor], Tensor] = lambda images: images,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Classify a decoded dataset, distributed over all processes.

    Args:
        model: An image classifier.
        processor: Its image processor.
        dataset: Columns `image`, uint8 (3, H, W), and `label`.
        batch_size: Batch size per process.
        bf16: Compute in bfloat16.
        depth: Depth of the layer whose features are returned, see `pool_layer`.
        transform: Applied to each batch, uint8 (B, 3, H, W) on the device, before `preprocess`.

    Returns:
        Logits float32 (N, C), labels (N,), and with `depth` also features float32 (N, D), on the
        CPU in the dataset's order.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    loader = DataLoader(DecodedImages(dataset), batch_size, collate_fn=DecodedImages.collate)
    # The model is not prepared: it is not trained, so each process has its own copy.
    model, loader = model.to(accelerator.device).eval(), accelerator.prepare(loader)
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16)
    batches = []
    with torch.inference_mode():
        for batch in tqdm(loader, "Predicting", disable=not accelerator.is_main_process):
            pixels = preprocess(transform(batch["pixel_values"]), processor)  # in float32
            with autocast:
                output = model(pixels, output_hidden_states=depth is not None)
            values = [output.logits.float(), batch["labels"]]
            values += [] if depth is None else [pool_layer(output, depth)]
            batches.append([value.cpu() for value in accelerator.gather_for_metrics(values)])
    return tuple(torch.cat(values) for values in zip(*batches, strict=True))


def pool_layer(output, depth: float) -> Tensor:
    """Return a layer's features, averaged over tokens or pixels: float32 (B, D).

    `depth` ranges from 0, the first layer, to 1. Logits are used if a model returns no layers.
    """
    layers = getattr(output, "hidden_states", None) or (output.logits,)
    layer = layers[round(depth * (len(layers) - 1))].float()
    if layer.ndim == 4:  # (B, D, H, W)
        return layer.mean(dim=(2, 3))
    return layer.mean(dim=1) if layer.ndim == 3 else layer  # (B, T, D)
