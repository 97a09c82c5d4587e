"""Find and restore a run's last complete checkpoint, and check that it belongs to the same run."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.recipe import RECIPE_DEFAULTS, Recipe
from pipeline.recipe_checks import NON_SEMANTIC_KEYS
from pipeline.runs import read_json, write_json


def restore(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Load a checkpoint's weights into the live model, all of them or none."""
    saved = type(model).from_pretrained(checkpoint, dtype=torch.float32)
    model.load_state_dict(saved.state_dict(), strict=True)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; incomplete ones are skipped with a warning."""
    numbers = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    for number in sorted((int(n) for n in numbers if n.isdecimal()), reverse=True):
        checkpoint = folder / f"checkpoint-{number}"
        if _is_complete(checkpoint):
            return checkpoint
        print(f"Skipping {checkpoint}: it is incomplete.")
    return None


@contextmanager
def lock_run(recipe: Recipe) -> Iterator[None]:
    """Lock the run's name; UserError if another process is training a run with that name."""
    path = recipe.checkpoint_folder.with_name(f".{recipe.run}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise UserError(
            f'The run "{recipe.run}" is being trained by another process: wait for it, or rename '
            "this run with ARGS=--run=NAME."
        ) from None


def check_same_setup(recipe: Recipe, data: str) -> None:
    """Raise UserError if the data or the number of processes has changed since the last session.

    Args:
        recipe: The run's recipe.
        data: The `fingerprint` of its data.
    """
    saved = read_json(recipe.checkpoint_folder / "setup.json")
    if saved and saved["data"] != data:
        raise UserError(
            f'The images or classes of "{recipe.data.dataset}" are not those that '
            f"{recipe.checkpoint_folder} was trained on: restore them, rename this run with "
            "ARGS=--run=NAME, or train again with ARGS=--restart."
        )
    if saved and saved["processes"] != recipe.training.world_size:
        raise UserError(
            f"{recipe.checkpoint_folder} was trained in {saved['processes']} processes, not "
            f"{recipe.training.world_size}, which would change the order of the images: resume "
            f"with NPROC={saved['processes']}, or train again with ARGS=--restart."
        )


def save_setup(recipe: Recipe, data: str) -> None:
    """Save the values that `check_same_setup` compares."""
    setup = {"data": data, "processes": recipe.training.world_size}
    write_json(recipe.checkpoint_folder / "setup.json", setup)


def check_same_recipe(recipe: Recipe) -> None:
    """Raise UserError if the run's folders contain a run of another recipe."""
    for folder in (recipe.model_folder, recipe.checkpoint_folder):
        file = folder / "recipe.yaml"
        if not file.exists():
            continue
        # Keys added after the file was saved had their default; patience was not saved once.
        now = recipe.settings
        before = RECIPE_DEFAULTS | {"early_stopping_patience": now.get("early_stopping_patience")}
        before |= yaml.safe_load(file.read_text("utf-8"))
        keys = (before.keys() | now.keys()) - NON_SEMANTIC_KEYS
        changed = sorted(key for key in keys if before.get(key) != now.get(key))
        if changed:
            examples = "; ".join(
                f"{key} is {now.get(key)} now, {before.get(key)} there" for key in changed[:3]
            )
            raise UserError(
                f"{folder} contains a run of another recipe ({examples}). Rename this run with "
                "ARGS=--run=NAME, or replace that one with ARGS=--restart."
            )


def _is_complete(checkpoint: Path) -> bool:
    try:
        # trainer_state.json is written last, so the other files were written before.
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        with safe_open(checkpoint / "model.safetensors", "pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    # The optimizer state as saved by the Trainer, FSDP or DeepSpeed.
    return any((checkpoint / name).exists() for name in ("optimizer.pt", "optimizer.bin", "latest"))
