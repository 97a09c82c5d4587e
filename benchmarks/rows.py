"""The measurements: one function per row, whose docstring is printed below the table."""

import importlib
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from timeit import timeit

import numpy as np
import scipy.stats
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from benchmarks import example
from benchmarks.machine import DEVICE, gflop_per_image
from pipeline.data.decoding import DecodedImages, decode
from pipeline.data.loading import load_raw, load_split
from pipeline.data.transforms import preprocess
from pipeline.evaluation.evaluate import evaluate, predict
from pipeline.evaluation.metrics import wilson_interval
from pipeline.recipe import DataArguments, ModelArguments, Recipe, load_recipe
from pipeline.runs import has_fast_bfloat16
from pipeline.training.model import build_model, build_processor, load_model
from pipeline.training.train import build_trainer, train

ROOT = Path(__file__).parents[1]
ON_CPU, DTYPE = DEVICE.type == "cpu", "bfloat16" if has_fast_bfloat16() else "float32"
SMALL = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 3}  # 2.7 M parameters
UNTIMED = ["--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false"]


def prepare_data(args: Namespace) -> list[dict]:
    """Ours decodes once to uint8, then resizes and normalizes batches. In the example's
    `with_transform`, the image processor does both for each image in each epoch."""
    raw, processor = load_images(args, "train", 200, 1_000), ViTImageProcessorPil()
    plain = raw.with_transform(example.transform(processor, augment=False))
    batches = 8 * [rows.tolist() for rows in torch.arange(len(raw)).split(50)]

    def ours() -> None:
        images = DecodedImages(decode(raw, processor))
        for rows in batches:
            preprocess(images.batch(rows)["pixel_values"].to(DEVICE), processor).sum().item()

    def theirs() -> None:
        for rows in batches:
            torch.stack(plain[rows]["pixel_values"]).sum().item()

    sides, name = {"ours": ours, "example": theirs}, "Prepare the data, 224 px, 8 epochs"
    return [compare(args, name, sides, images=8 * len(raw))]


def training(args: Namespace) -> list[dict]:
    """Timed after a warm-up. Ours and the tuned example use bfloat16 if it is fast, and on an
    accelerator also `torch.compile`. FLOPs are three forward passes, by `FlopCounterMode`."""
    base = (2, 1) if args.quick else (16, 4) if ON_CPU else (128, 60)
    small = 64, 3 if args.quick else 40
    return [compare_training(args, 224, *base), compare_training(args, 32, *small)]


def compare_training(args: Namespace, size: int, batch: int, steps: int) -> dict:
    model, raw, warmup = save_vit(size), load_images(args, "train"), max(1, steps // 3)
    settings = {"per_device_train_batch_size": batch, "max_steps": warmup + steps}
    options = [f"--{key}={value}" for key, value in settings.items()]
    options += [f"--image_size={size}", f"--torch_compile={not ON_CPU}", *UNTIMED]

    def timer(build: Callable) -> float:
        clock, trainer = Clock(timed=(warmup, warmup + steps)), build()
        trainer.add_callback(clock)
        trainer.train()
        return clock.times[-1] - clock.times[warmup]

    theirs = partial(example.build_trainer, raw, model, size)
    sides = {"ours": lambda: build_trainer(resolve(args, "vit-base", model, *options))}
    sides["example"] = lambda: theirs(settings)
    sides |= {"tuned": lambda: theirs(settings | example.TUNED)} if example.TUNED else {}
    name = f"Train {Path(model).name}, {size} px, batch {batch}"
    gflop = 3 * gflop_per_image(model, size)  # the backward pass costs two forward passes
    return compare(args, name, sides, batch * steps, gflop=gflop, dtype=DTYPE, timer=timer)


def equal_time(args: Namespace) -> list[dict]:
    """Recipe `cpu`, and without its image_size_schedule and linear_probe_samples ("plain"); the
    example at its own image size (in parentheses), and tuned at ours. The examples use the guide's
    settings, and bfloat16 if ours does. The time includes data preparation."""
    model, minutes = args.model or save_vit(98), 0.1 if args.quick else args.minutes
    options = "cpu", model, "--max_steps=1000000", *UNTIMED
    without = ["--image_size_schedule=null", "--linear_probe_samples=0"]
    ours, plain = (resolve(args, *options, *changes) for changes in ([], without))
    own = transformers.AutoImageProcessor.from_pretrained(model).size.get("height", 224)
    size, errors = ours.model.image_size, {}
    theirs = partial(example.build_trainer, load_images(args, "train"), model)
    settings = example.GUIDE | example.TUNED | {"max_steps": 1_000_000}
    sides = {"ours": partial(build_trainer, ours), "plain": partial(build_trainer, plain)}
    sides |= {"example": partial(theirs, own, settings), "tuned": partial(theirs, size, settings)}
    for side, build in sides.items():
        clock, trainer = Clock(60 * minutes), build()  # start the clock first
        schedule = ours.model.image_size_schedule if side == "ours" else {"0": size}
        trainer.progress = partial(clock.share_of_steps, model, schedule)
        trainer.create_optimizer()
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, learning_rate(trainer))
        trainer.add_callback(clock)
        trainer.train()
        test = load_split(ours.data, "test", processor := trainer.processing_class)
        logits, labels = predict(trainer.model, processor, test, bf16=DTYPE == "bfloat16")
        wrong, total = int((logits.argmax(dim=1) != labels).sum()), len(labels)
        interval = [100 * bound for bound in wilson_interval(wrong, total)]
        errors[side] = summarize([100 * wrong / total], interval)
    name = f"Test error after {minutes:g} minutes, {Path(model).name}, {size}"
    row = {"name": f"{name} px, plain", "unit": "%", "ours": errors.pop("plain")}
    return [{"name": f"{name} ({own}) px", "unit": "%", **errors}, row]


def one_image(args: Namespace) -> list[dict]:
    """The Space's classifier with attention maps, and `pipeline()` in float32, on the CPU."""
    sys.path.append(str(ROOT / "space"))
    space, model = importlib.import_module("inference"), save_vit(224)
    ours = space.Classifier(model)
    theirs = transformers.pipeline("image-classification", model=model, device="cpu")
    images = [space.open_picture(path.read_bytes()) for path in space.EXAMPLES[:5]]
    sides = {"ours": lambda: [ours.predict(image) for image in images]}
    sides["example"] = lambda: [theirs(image) for image in images]
    work = {"gflop": ON_CPU * gflop_per_image(model, 224), "dtype": ours.precision}
    name = f"One image, ViT-B/16, {ours.precision}"
    return [compare(args, name, sides, len(images), unit="ms", **work)]


def score_split(args: Namespace) -> list[dict]:
    """All in float32: ours as in `make evaluate`; `pipeline()` one by one; tuned, batches of 64."""
    model, size = (args.model, 98) if args.model else (save_vit(32), 32)
    raw, arguments = load_images(args, "test", 256, 2_048), ModelArguments(model, image_size=size)
    build_model(arguments, raw.features["label"].names).save_pretrained("scored")
    build_processor(arguments).save_pretrained("scored")
    network, processor = load_model("scored")
    test, images = decode(raw, processor), raw["image"][:]
    theirs = transformers.pipeline("image-classification", model="scored")
    sides = {"ours": lambda: predict(network, processor, test)}
    sides["example"] = lambda: [theirs(image) for image in images]
    sides["tuned"] = lambda: theirs(images, batch_size=64)
    name, gflop = f"Score a split, {Path(model).name}, {size} px", gflop_per_image(model, size)
    return [compare(args, name, sides, len(raw), gflop=gflop)]


def memory(args: Namespace) -> list[dict]:
    """Peak memory of `train_vit.py` and its child processes, including decoding. Mapped files do
    not count, since the kernel reclaims their pages when needed. Linux only."""
    part, model, comparisons = load_images(args, "train", 1_000, 10_000), save_vit(32), []
    for copies in (1, 5 if args.quick else 100):
        data, peak = Path(f"copies-{copies}").resolve(), 0
        for i in range(copies):
            part.to_parquet(data / f"train-{i}.parquet")
        options = [f"--dataset={data}", f"--model={model}", "--image_size=32", "--max_steps=2"]
        command = [sys.executable, ROOT / "scripts/train_vit.py", "--restart", *options, *UNTIMED]
        variables = os.environ | {"HF_DATASETS_CACHE": f"{data}-cache"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=variables, process_group=0, **quiet)
        while process.poll() is None:
            with suppress(OSError):  # a process may have ended
                paths = Path("/proc").glob("[0-9]*/smaps_rollup")
                texts = [p.read_text() for p in paths if os.getpgid(int(p.parts[2])) == process.pid]
                kilobytes = [int(t.split("Pss_Anon:")[1].split()[0]) for t in texts if t]
                peak = max(peak, sum(kilobytes) * 1024 / 1e6)
            time.sleep(0.1)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        about = {"name": f"Peak memory, training on {copies * len(part):,} images", "unit": "MB"}
        comparisons.append(about | {"ours": summarize([peak])})
    return comparisons


def recipe(args: Namespace) -> list[dict]:
    """Time from decoding to the saved model, and mean test accuracy with its 95 % interval, over
    three seeds. Without `--model`, the backbone is an untrained ViT-B/16."""
    quick = ["--image_size=8", "--max_steps=2"] if args.quick else []
    model, minutes, accuracies = args.model or save_vit(8 if quick else 224), [], []
    for seed in range(3):
        options = [f"--seed={seed}", f"--torch_compile={not ON_CPU}", *quick]
        run = resolve(args, args.recipe, model, *options, run=f"seed-{seed}")
        minutes.append(timeit(partial(train, run), number=1) / 60)
        accuracies.append(100 * evaluate(str(run.model_folder), run.data)["accuracy"])
    error, name = scipy.stats.sem(accuracies) or 1e-9, f"recipe {Path(args.recipe).stem}"
    interval = scipy.stats.t.interval(0.95, 2, np.mean(accuracies), error)
    accuracy = summarize(accuracies, interval) | {"value": statistics.mean(accuracies)}
    return [{"name": f"Train by {name}", "unit": "minutes", "ours": summarize(minutes)},
            {"name": f"Accuracy, {name}", "unit": "%", "ours": accuracy}]  # fmt: skip


ROWS = prepare_data, training, equal_time, one_image, score_split, memory, recipe
ROWS = {row.__name__.replace("_", "-"): row for row in ROWS}
LONG = ["recipe"] if ON_CPU else []  # takes days without an accelerator


def compare(
    args: Namespace, name: str, sides: dict[str, Callable], images: int, *, unit="images/s",
    gflop=0.0, dtype="float32", timer: Callable[[Callable], float] = partial(timeit, number=1),  # noqa: B008
) -> dict:  # fmt: skip
    """Time the sides, each on `images`, in turn, so that a slowdown of the machine affects all.
    `gflop`, the GFLOPs per image in `dtype`, gives our share of the machine's peak rate."""
    taken = {side: [] for side in sides}
    for _ in range(1 if args.quick else 3):
        for side, function in sides.items():
            taken[side].append(timer(function) / images)  # seconds
    share = gflop / statistics.median(taken["ours"]) / args.gflops.get(dtype, float("inf"))
    values = {s: [1000 * t if unit == "ms" else 1 / t for t in ts] for s, ts in taken.items()}
    about = {"name": name, "unit": unit, "share": share}
    return about | {side: summarize(each) for side, each in values.items()}


def load_images(args: Namespace, split: str, quick: int = 10**9, most: int = 10**9):
    """Load the first images of a split, undecoded."""
    raw = load_raw(DataArguments(args.dataset))[split]
    return raw.select(range(min(len(raw), quick if args.quick else most)))


def resolve(args: Namespace, name: str, model: str | None, *options: str, **run: str) -> Recipe:
    """Load a recipe for the benchmark's dataset, and for a model if it is not the recipe's."""
    given = [f"--dataset={args.dataset}"] + [f"--model={model}"] * bool(model)
    return load_recipe(name, [*given, *options], **run)


def save_vit(size: int) -> str:
    """Save an untrained ViT, as fast as a trained one: ViT-B/16 at 224 px, or 2.7 M parameters."""
    folder = Path("ViT-B-16" if size == 224 else "ViT-2.7M").resolve()
    small = SMALL | {"patch_size": 14 if size == 98 else 4} if size < 224 else {}
    config = transformers.ViTConfig(num_labels=10, image_size=size, **small)
    network = transformers.ViTForImageClassification(config)
    network.classifier.bias.data[0] = 3  # makes predictions as clear as those of a trained model
    network.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


def summarize(values: list[float], interval: list[float] | None = None) -> dict:
    """Return the median `value` and its range: a 95 % interval, or else minimum and maximum."""
    low, high = interval or (min(values), max(values))
    return {"value": statistics.median(values), "low": low, "high": high, "runs": len(values)}


class Clock(transformers.TrainerCallback):
    """Record when each training step ended (exact for `timed` ones), stop when time is over."""

    def __init__(self, seconds: float = float("inf"), timed: tuple[int, ...] = ()):
        self.times, self.seconds, self.timed = [time.monotonic()], seconds, timed

    def share_spent(self) -> float:
        return min(1.0, (time.monotonic() - self.times[0]) / self.seconds)

    def on_step_end(self, args, state, control, **kwargs):
        if not ON_CPU and state.global_step in (self.timed or [state.global_step]):
            torch.accelerator.synchronize()
        self.times.append(time.monotonic())
        control.should_training_stop |= self.share_spent() == 1

    def share_of_steps(self, model: str, schedule: dict[str, int]) -> float:
        """Return the share of steps done, where a step's time is proportional to its FLOPs."""
        starts = [*map(float, schedule), 1.0]
        times = [gflop_per_image(model, size) for size in schedule.values()] * np.diff(starts)
        return float(np.interp(self.share_spent() * times.sum(), [0, *times.cumsum()], starts))


def learning_rate(trainer: transformers.Trainer) -> Callable[[int], float]:
    """Return a learning-rate schedule over a trainer's progress instead of its steps."""
    args, optimizer = trainer.args, torch.optim.SGD([torch.zeros(1)])
    warmup = args.get_warmup_steps(1000)
    schedule = transformers.get_scheduler(args.lr_scheduler_type, optimizer, warmup, 1000)
    return lambda _: schedule.lr_lambdas[0](1000 * trainer.progress())
