"""The machine's peak FLOP rate, and the FLOPs of a model."""

from functools import lru_cache
from timeit import timeit

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")


def matrix_rate(dtype: str, side: int = 256) -> float:
    """Return the GFLOP/s of the fastest square matrix product, at increasing sizes."""
    matrix = torch.randn(side, side, device=DEVICE).to(getattr(torch, dtype))
    taken = min(timeit(lambda: (matrix @ matrix)[0, 0].item(), number=1) for _ in range(10))
    rate, is_last = 2 * side**3 / taken / 1e9, taken > 0.03 or side == 8192
    return rate if is_last else max(rate, matrix_rate(dtype, 2 * side))


@lru_cache
def gflop_per_image(model: str, image_size: int) -> float:
    """Return the GFLOPs of a forward pass (products, convolutions); a multiply-add is two."""
    config = AutoConfig.from_pretrained(model, image_size=image_size)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        # Eager, since the counter does not support fused attention on a CPU.
        network = AutoModelForImageClassification.from_config(config, attn_implementation="eager")
        network(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops() / 1e9
