"""What is measured: one function for each row; its docstring is printed below the table."""

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
SMALL |= {"num_attention_heads": 3, "patch_size": 4}  # 2.7 M parameters
UNTIMED = ["--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=false"]


def prepare_data(args: Namespace) -> list[dict]:
    """Ours decodes once to uint8, then resizes and normalizes batches; in the example's
    `with_transform`, the image processor does it all for each image in each epoch."""
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


def train_base(args: Namespace) -> list[dict]:
    """After a warm-up. If bfloat16 is fast, ours and the tuned example have it; on an accelerator,
    `torch.compile` too. The share counts products by `FlopCounterMode`: three forward passes."""
    sizes = {"batch": 2, "steps": 1} if args.quick else {"batch": 16, "steps": 4}
    return compare_training(args, 224, **(sizes if ON_CPU else {"batch": 128, "steps": 60}))


def train_small(args: Namespace) -> list[dict]:
    """As ViT-B/16; here, all but the arithmetic weighs most."""
    return compare_training(args, 32, batch=64, steps=3 if args.quick else 40)


def compare_training(args: Namespace, size: int, batch: int, steps: int) -> list[dict]:
    model, raw, warmup = save_vit(size), load_images(args, "train"), max(1, steps // 3)
    settings = {"per_device_train_batch_size": batch, "max_steps": warmup + steps}
    options = [f"--{key}={value}" for key, value in settings.items()]
    options += [f"--image_size={size}", f"--torch_compile={not ON_CPU}", *UNTIMED]

    def timer(build: Callable) -> float:
        clock, trainer = Clock(), build()
        trainer.add_callback(clock)
        trainer.train()
        return clock.times[-1] - clock.times[warmup]

    theirs = partial(example.build_trainer, raw, model, size)
    sides = {"ours": lambda: build_trainer(resolve(args, "vit-base", model, *options))}
    sides["example"] = lambda: theirs(settings)
    sides |= {"tuned": lambda: theirs(settings | example.TUNED)} if example.TUNED else {}
    name = f"Train {Path(model).name}, {size} px, batch {batch}"
    gflop = 3 * gflop_per_image(model, size)  # the backward pass is two forward passes
    return [compare(args, name, sides, batch * steps, gflop=gflop, dtype=DTYPE, timer=timer)]


def equal_time(args: Namespace) -> list[dict]:
    """Recipe `cpu`; the example at its own image size (in brackets); tuned, at ours. Both have the
    guide's settings, and bfloat16 where ours has it. The time includes the data's preparation."""
    model, options = args.model or save_vit(48), [] if args.model else ["--image_size=32"]
    ours = resolve(args, "cpu", model, "--max_steps=1000000", *UNTIMED, *options)
    own = transformers.AutoImageProcessor.from_pretrained(model).size.get("height", 224)
    size, minutes, errors = ours.model.image_size, 0.1 if args.quick else args.minutes, {}
    theirs = partial(example.build_trainer, load_images(args, "train"), model)
    settings = example.GUIDE | example.TUNED | {"max_steps": 1_000_000}
    sides = {"ours": partial(build_trainer, ours), "example": partial(theirs, own, settings)}
    for side, build in (sides | {"tuned": partial(theirs, size, settings)}).items():
        clock, trainer = Clock(60 * minutes), build()  # the clock first
        trainer.create_optimizer()
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, clock.schedule(trainer.args))
        trainer.add_callback(clock)
        trainer.train()
        processor = trainer.processing_class
        test = load_split(ours.data, "test", processor)
        logits, labels = predict(trainer.model, processor, test, bf16=DTYPE == "bfloat16")
        wrong, total = int((logits.argmax(dim=1) != labels).sum()), len(labels)
        interval = [100 * bound for bound in wilson_interval(wrong, total)]
        errors[side] = summarize([100 * wrong / total], interval)
    name = f"Test error after {minutes:g} minutes, {Path(model).name}, {size} ({own}) px"
    return [{"name": name, "unit": "%", **errors}]


def one_image(args: Namespace) -> list[dict]:
    """The Space's classifier, attention maps included, and `pipeline()` in float32, on the CPU."""
    sys.path.append(str(ROOT / "space"))
    space, model = importlib.import_module("inference"), save_vit(224)
    ours = space.Classifier(model)
    theirs = transformers.pipeline("image-classification", model=model, device="cpu")
    images = [space.open_picture(path.read_bytes()) for path in space.EXAMPLES[:5]]
    sides = {"ours": lambda: [ours.predict(image) for image in images]}
    sides["example"] = lambda: [theirs(image) for image in images]
    work, name = {}, f"One image, ViT-B/16, {ours.precision}"
    if ON_CPU and ours.precision in args.gflops:  # the limit in int8 is not measured
        work = {"gflop": gflop_per_image(model, 224), "dtype": ours.precision}
    return [compare(args, name, sides, len(images), unit="ms", **work)]


def score_split(args: Namespace) -> list[dict]:
    """All in float32: ours as `make evaluate`; `pipeline()` one by one; tuned, in batches of 64."""
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
    """Most memory that `train_vit.py` and its children hold together, decoding included. Mapped
    files are left out: the kernel takes their pages back as it needs them. Linux only."""
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
            with suppress(OSError):  # a process has ended meanwhile
                paths = Path("/proc").glob("[0-9]*/smaps_rollup")
                texts = [p.read_text() for p in paths if os.getpgid(int(p.parts[2])) == process.pid]
                kilobytes = [int(t.split("Pss_Anon:")[1].split()[0]) for t in texts if t]
                peak = max(peak, sum(kilobytes) / 1024)
            time.sleep(0.1)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        name = f"Peak memory, training on {copies * len(part):,} images"
        comparisons.append({"name": name, "unit": "MB", "ours": summarize([peak])})
    return comparisons


def demo(args: Namespace) -> list[dict]:
    """In an empty folder, once the environment is set up."""
    Path("scripts").symlink_to(ROOT / "scripts")
    make = ["make", "-f", ROOT / "Makefile", "-o", ".venv/.runs", f"BIN={sys.prefix}/bin", "demo"]
    taken = timeit(partial(subprocess.run, make, capture_output=True, check=True), number=1)
    return [{"name": "`make demo`", "unit": "s", "ours": summarize([taken])}]


def whole_recipe(args: Namespace) -> list[dict]:
    """From decoding to the saved model, of an untrained ViT-B/16."""
    model, size, steps = (save_vit(32), 32, 2) if args.quick else (save_vit(224), 224, -1)
    options = [f"--image_size={size}", f"--max_steps={steps}", f"--torch_compile={not ON_CPU}"]
    recipe = resolve(args, "vit-base", model, *options, run="whole")
    minutes = timeit(partial(train, recipe), number=1) / 60
    return [{"name": "Train by recipe vit-base", "unit": "minutes", "ours": summarize([minutes])}]


def fine_tune(args: Namespace) -> list[dict]:
    """Accuracy on the test split over three seeds, with the 95 % interval of the mean."""
    quick = [f"--model={save_vit(32)}", "--image_size=32", "--max_steps=2"] if args.quick else []
    accuracies = []
    for seed in range(3):
        options = [f"--seed={seed}", *quick]
        recipe = resolve(args, args.recipe, args.model, *options, run=f"seed-{seed}")
        accuracies.append(100 * evaluate(train(recipe)["model_folder"], recipe.data)["accuracy"])
    mean, error = statistics.mean(accuracies), scipy.stats.sem(accuracies) or 1e-9
    ours = summarize(accuracies, scipy.stats.t.interval(0.95, 2, mean, error))
    return [{"name": f"Accuracy, recipe {Path(args.recipe).stem}", "unit": "%", "ours": ours}]


ROWS = {"prepare-data": prepare_data, "train-base": train_base, "train-small": train_small}
ROWS |= {"equal-time": equal_time, "one-image": one_image, "score-split": score_split}
ROWS |= {"memory": memory, "demo": demo, "recipe": whole_recipe, "fine-tune": fine_tune}
LONG = ["recipe", "fine-tune"] if ON_CPU else []  # hours without an accelerator


def compare(
    args: Namespace, name: str, sides: dict[str, Callable], images: int, *, unit="images/s",
    gflop=0.0, dtype="float32", timer: Callable[[Callable], float] = partial(timeit, number=1),  # noqa: B008
) -> dict:  # fmt: skip
    """Time sides that take `images` each, in turn, so that a machine that slows down slows all.
    `gflop`, 10^9 operations of an image in `dtype`, gives our share of the machine's limit."""
    taken = {side: [] for side in sides}
    for _ in range(1 if args.quick else 3):
        for side, function in sides.items():
            taken[side].append(timer(function) / images)  # seconds
    share = gflop / statistics.median(taken["ours"]) / args.gflops[dtype]
    values = {s: [1000 * t if unit == "ms" else 1 / t for t in ts] for s, ts in taken.items()}
    about = {"name": name, "unit": unit, "share": share}
    return about | {side: summarize(each) for side, each in values.items()}


def load_images(args: Namespace, split: str, quick: int = 10**9, most: int = 10**9):
    """Load the first images of a split, undecoded."""
    raw = load_raw(DataArguments(args.dataset))[split]
    return raw.select(range(min(len(raw), quick if args.quick else most)))


def resolve(args: Namespace, name: str, model: str | None, *options: str, **run: str) -> Recipe:
    """Load a recipe for the dataset that is measured, and a model unless that is the recipe's."""
    given = [f"--dataset={args.dataset}"] + [f"--model={model}"] * bool(model)
    return load_recipe(name, [*given, *options], **run)


def save_vit(size: int) -> str:
    """Save an untrained ViT, as fast as a trained one: ViT-B/16 at 224 px, or one of 2.7 M."""
    folder = Path("ViT-B-16" if size == 224 else "ViT-2.7M").resolve()
    small = SMALL if size < 224 else {}
    config = transformers.ViTConfig(num_labels=10, image_size=size, **small)
    network = transformers.ViTForImageClassification(config)
    network.classifier.bias.data[0] = 3  # a class that is predicted as clearly as a trained one is
    network.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


def summarize(values: list[float], interval: list[float] | None = None) -> dict:
    """Return the median `value` and its range, a 95 % interval or else the least and the most."""
    low, high = interval or (min(values), max(values))
    return {"value": statistics.median(values), "low": low, "high": high, "runs": len(values)}


class Clock(transformers.TrainerCallback):
    """Notes when each step of a training ended, and stops it when the time is over."""

    def __init__(self, seconds: float = float("inf")):
        self.times, self.seconds = [time.monotonic()], seconds

    def share_spent(self) -> float:
        return min(1.0, (time.monotonic() - self.times[0]) / self.seconds)

    def on_step_end(self, args, state, control, **kwargs):
        if not ON_CPU:
            torch.accelerator.synchronize()
        self.times.append(time.monotonic())
        control.should_training_stop |= self.share_spent() == 1

    def schedule(self, args: transformers.TrainingArguments) -> Callable[[int], float]:
        """Return the schedule of the learning rate, over the time in place of steps."""
        optimizer, warmup = torch.optim.SGD([torch.zeros(1)]), args.get_warmup_steps(1000)
        schedule = transformers.get_scheduler(args.lr_scheduler_type, optimizer, warmup, 1000)
        return lambda _: schedule.lr_lambdas[0](1000 * self.share_spent())
