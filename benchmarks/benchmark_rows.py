"""What the benchmark measures: each row a function that gives one or more pairs of figures.

The two sides of a pair are run in turn, so that a machine that slows down slows both.
"""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import benchmark_example as example
import datasets
import psutil
import torch
from benchmark_space import in_turn, random_vit
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoImageProcessor,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    get_scheduler,
    pipeline,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from pipeline import environment
from pipeline.data import TEST_SIZE, Batches, carve, decode, load_raw, load_splits
from pipeline.evaluation import evaluate, predict
from pipeline.metrics import wilson_interval
from pipeline.model import build, build_processor, load
from pipeline.preprocess import preprocess
from pipeline.recipe import load_recipe
from pipeline.training import prepare, train

ROOT = Path(__file__).parents[1]
EPOCHS = 8  # of the headline recipe
SEEDS = 3
T_95 = 4.303  # Student's t for the mean of so many
STEPS = [f"--{key}_strategy=steps" for key in ("eval", "save")]
SHORT = ["--image_size=32", "--max_steps=2", "--eval_steps=2", "--save_steps=2", *STEPS]
UNTIMED = [f"--{key}=no" for key in ("eval_strategy", "save_strategy", "logging_strategy")]
UNTIMED += ["--load_best_model_at_end=false", "--disable_tqdm=true", "--dataloader_drop_last=true"]


@dataclass
class Pair:
    """One figure, ours beside the other side's; `tuned` with its faster settings on.

    `target` is how many times better ours should be, `target_tuned` the same beside the tuned
    side or, where there is no other side, the most `ours` should be (the least, if `least`).
    `sides` says in words what is compared.
    """

    what: str
    unit: str
    ours: list[float]
    theirs: list[float] | None = None
    tuned: list[float] | None = None
    target: float | None = None
    target_tuned: float | None = None
    less_is_better: bool = False
    least: bool = False
    met: bool | None = None
    sides: str = ""


@dataclass
class Setting:
    """Where the benchmark runs: the data, the pretrained backbone if any, an empty folder."""

    dataset: str
    backbone: str | None
    folder: Path
    quick: bool
    seconds: float  # of training, each side of `equal_time`
    recipe: str

    def raw(self) -> datasets.Dataset:
        """The training images as published, columns `image` and `label`; none that test."""
        recipe = load_recipe("vit-base", [f"--dataset={self.dataset}"])
        found = load_raw(recipe.data)
        return (found if "test" in found else carve(found["train"], "test", TEST_SIZE))["train"]

    def small_vit(self) -> str:
        """A ViT of 2.7 M parameters for 32 px, 8 x 8 patches, untrained, saved."""
        folder = self.folder / "vit-small"
        if not folder.exists():
            torch.manual_seed(0)
            size = {"hidden_size": 192, "intermediate_size": 768, "image_size": 32}
            depth = {"num_hidden_layers": 6, "num_attention_heads": 3, "patch_size": 4}
            config = ViTConfig(num_labels=10, **size, **depth)
            ViTForImageClassification(config).save_pretrained(folder)
            ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        return str(folder)

    def vit_base(self) -> str:
        folder = self.folder / "vit-base"
        return str(folder) if folder.exists() else random_vit(folder)


def arithmetic() -> dict[str, float]:
    """10^9 operations a second of one large matrix product, in the two precisions that train:
    processors of one name differ twofold.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    side, found = 2048 if device.type == "cpu" else 8192, {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=device).to(dtype)
        found[str(dtype).removeprefix("torch.")] = statistics.median(
            _rate(lambda a=a: (a @ a).flatten()[0].item(), 2 * side**3 / 1e9) for _ in range(5)
        )
    return found


def preprocessing(setting: Setting) -> list[Pair]:
    """Images to what a ViT takes at 224 px: once before training, and at each epoch."""
    raw = setting.raw()
    processor = ViTImageProcessorPil()
    count = min(len(raw), 2_000 if setting.quick else 40_000)
    few = raw.select(range(min(count, 200 if setting.quick else 2_000)))
    repeats = 1 if setting.quick else 3

    decoded, mapped = [], []  # the last of each: 600 kB an image

    def map_ours() -> None:
        _remove(decoded)
        decoded.append(decode(raw.select(range(count)), "train", 224, 3))

    def map_theirs(num_proc: int | None = None) -> None:
        _remove(mapped)
        mapped.append(
            few.map(
                lambda batch: processor([i.convert("RGB") for i in batch["image"]]),
                batched=True,
                batch_size=100,
                remove_columns=["image"],
                num_proc=num_proc,
            )
        )

    cores = os.cpu_count()
    with _no_cache():
        once = _alternate(
            repeats,
            ours=lambda: _rate(map_ours, count),
            theirs=lambda: _rate(map_theirs, len(few)),
            tuned=lambda: _rate(lambda: map_theirs(cores), len(few)),
        )
        batches = Batches(decoded[0])
        floats = mapped[0].with_format("torch")
        plain = few.with_transform(example.test_transform(processor))
        device = torch.accelerator.current_accelerator() or torch.device("cpu")

        def deliver() -> None:
            for start in range(0, len(few), 64):
                rows = list(range(start, min(start + 64, len(few))))
                images = batches.__getitems__(rows)["pixel_values"].to(device)
                float(preprocess(images, processor).sum())

        def deliver_theirs(dataset) -> None:
            for start in range(0, len(few), 64):
                float(torch.stack(list(dataset[start : start + 64]["pixel_values"])).sum())

        deliver()
        each = _alternate(
            repeats,
            ours=lambda: _rate(deliver, len(few)),
            theirs=lambda: _rate(lambda: deliver_theirs(plain), len(few)),
            tuned=lambda: _rate(lambda: deliver_theirs(floats), len(few)),
        )
        sizes = [_bytes_on_disk(decoded[0]) / count, _bytes_on_disk(mapped[0]) / len(few)]

    def whole(prepare_rate: float, rate: float) -> float:
        return EPOCHS / (1 / prepare_rate + EPOCHS / rate)

    pairs = [
        Pair("Preprocessing for 224 px, once", "images/s", *once.values(), target=25,
             sides=f"`map` to uint8; the processor in `map`; tuned: in {cores} processes"),
        Pair("Bytes on disk, an image", "B", [sizes[0]], [sizes[1]], target=100,
             less_is_better=True),
        Pair("Pixels for the model, each epoch", "images/s", *each.values(),
             sides="read, resize, normalise; the processor in `with_transform`; tuned: read what "
             "`map` wrote"),
        Pair(f"Both, over {EPOCHS} epochs", "images/s",
             [whole(*rates) for rates in zip(once["ours"], each["ours"], strict=True)],
             each["theirs"],
             [whole(*rates) for rates in zip(once["tuned"], each["tuned"], strict=True)],
             sides="`with_transform` prepares nothing once"),
    ]  # fmt: skip
    _remove(decoded)
    _remove(mapped)
    return pairs


def training_base(setting: Setting) -> list[Pair]:
    """Training, ViT-B/16 at 224 px: images a second through the whole loop."""
    if torch.accelerator.is_available():
        batch, warm, steps = 128, 20, 60
    else:
        batch, warm, steps = (4, 1, 1) if setting.quick else (16, 1, 4)
    options = ["--torch_compile=true"] if torch.accelerator.is_available() else []
    return _training(
        setting, setting.vit_base(), 224, batch, warm, steps,
        "ViT-B/16 at 224 px", 4 if options else 2.5, options,
    )  # fmt: skip


def training_small(setting: Setting) -> list[Pair]:
    """Training, a small ViT at 32 px, where all but the arithmetic weighs most."""
    warm, steps = (2, 6) if setting.quick else (5, 40)
    what = "ViT of 2.7 M at 32 px"
    return _training(setting, setting.small_vit(), 32, 64, warm, steps, what, 2)


def equal_time(setting: Setting) -> list[Pair]:
    """Test accuracy after the same time by the clock, preparation included, same backbone.

    Recipe cpu against the example's own defaults, its image size too, with its faster settings
    on: so it sees the most images in that time.
    """
    backbone = setting.backbone or setting.small_vit()
    options = [f"--dataset={setting.dataset}", f"--model={backbone}", *UNTIMED]
    if setting.backbone is None:
        options += ["--image_size=32"]
    accuracies, notes, intervals = [], [], []
    for side in ("recipe cpu", "the example"):
        started = time.monotonic()
        if side == "recipe cpu":
            with _no_cache():  # it decodes anew
                trainer = prepare(load_recipe("cpu", [*options, "--max_steps=1000000"]))
        else:
            raw = setting.raw()
            processor = AutoImageProcessor.from_pretrained(backbone, backend="pil")
            model = example.load_backbone(backbone, raw.features["label"].names)
            trainer = example.build_trainer(
                raw, model, processor, example.BATCH, 1_000_000, setting.folder / "example",
                tuned=True, accumulation=example.ACCUMULATION,
            )  # fmt: skip
        clock = _Deadline(started, setting.seconds)
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer()
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, _by_the_clock(trainer.args, clock))
        trainer.add_callback(clock)
        trainer.train()
        took = time.monotonic() - started
        batch = trainer.get_total_train_batch_size(trainer.args)
        images = trainer.state.global_step * batch
        right, total = _right(trainer, setting)
        intervals.append(wilson_interval(right, total))
        accuracies.append(100 * right / total)
        low, high = (100 * bound for bound in intervals[-1])
        notes.append(
            f"{side}, {trainer.processing_class.size['height']} px, {batch} images a step: "
            f"{accuracies[-1]:.2f} % ({low:.2f} to {high:.2f}), {images:,} images in {took:.0f} s"
        )
        print(f"  {notes[-1]}", flush=True)
    what = "ViT of 2.7 M" if setting.backbone is None else Path(backbone).name
    return [
        Pair(f"Test accuracy after {setting.seconds / 60:.3g} minutes each, {what}", "%",
             accuracies[:1], None, accuracies[1:], met=intervals[0][0] > intervals[1][1],
             sides="; ".join(notes)),
    ]  # fmt: skip


def one_image(setting: Setting) -> list[Pair]:
    """Milliseconds for one image through a published model on the CPU: the Space's, with its
    attention maps, and `pipeline()` as it comes.
    """
    sys.path.append(str(ROOT / "space"))
    import inference

    model = setting.vit_base()
    images = [inference.open_picture(path) for path in inference.EXAMPLES]
    ours_is = inference.Classifier(model)
    ours, plain = in_turn(
        ours_is.answer,
        pipeline("image-classification", model=model, device="cpu"),
        images,
        5 if setting.quick else 40,
    )
    fast = environment.fast_bfloat16()
    return [
        Pair("One image through a ViT-B/16", "ms", ours, plain, target=3 if fast else 1,
             less_is_better=True,
             sides=f"as the Space does it, attention maps too, {ours_is.precision}; `pipeline()`, "
             "float32"),
    ]  # fmt: skip


def test_split(setting: Setting) -> list[Pair]:
    """Images a second where a split is scored: ours, and `pipeline()` in a loop or batched."""
    models = {"ViT of 2.7 M at 32 px": (setting.small_vit(), 32)}
    if setting.backbone:
        models[f"{Path(setting.backbone).name} at 98 px"] = (setting.backbone, 98)
    pairs = []
    for name, (backbone, size) in models.items():
        recipe = load_recipe(
            "cpu", [f"--dataset={setting.dataset}", f"--model={backbone}", f"--image_size={size}"]
        )
        processor = build_processor(recipe.model)
        test = load_splits(recipe.data, size, processor.resample, only="test")["test"]
        folder = setting.folder / f"scored-{size}"
        build(recipe.model, test.features["label"].names).save_pretrained(folder)
        processor.save_pretrained(folder)
        model, processor = load(str(folder))
        one, many = (20, 64) if setting.quick else (200, 1024)
        test = test.select(range(min(len(test), 256 if setting.quick else 2_048)))
        pictures = [
            datasets.Image().decode_example(datasets.Image().encode_example(image))
            for image in test.select(range(min(len(test), many)))
            .with_format("numpy")["image"][:]
            .transpose(0, 2, 3, 1)  # (N, 3, H, W) to (N, H, W, 3)
        ]
        found = _scoring_rates(model, processor, test, pictures, str(folder), one, setting.quick)
        theirs, tuned = found.pop("theirs"), found.pop("tuned")
        pairs += [
            Pair(f"Scoring a split, {how}, {name}", "images/s", ours, theirs, tuned, target=10,
                 target_tuned=2,
                 sides="`pipeline()` in float32, in a loop; tuned: in batches of 64")
            for how, ours in found.items()
        ]  # fmt: skip
    return pairs


def _scoring_rates(model, processor, test, pictures, folder, one, quick) -> dict[str, list[float]]:
    classify = pipeline("image-classification", model=folder)

    def ours(bf16: bool) -> Callable[[], float]:
        return lambda: _rate(lambda: predict(model, processor, test, bf16=bf16), len(test))

    return _alternate(
        1 if quick else 3,
        float32=ours(bf16=False),
        **({"`--bf16`": ours(bf16=True)} if environment.fast_bfloat16() else {}),
        theirs=lambda: _rate(lambda: [classify(image) for image in pictures[:one]], one),
        tuned=lambda: _rate(lambda: classify(pictures, batch_size=64), len(pictures)),
    )


def memory(setting: Setting) -> list[Pair]:
    """Peak memory of `train_vit.py`, decoding included, as the dataset grows a hundredfold."""
    few, factor = (1_000, 5) if setting.quick else (10_000, 100)
    found, counts = [], []
    raw = setting.raw()
    part = raw.select(range(min(few, len(raw))))
    for copies in (-(-few // len(part)), -(-few // len(part)) * factor):
        folder = setting.folder / f"rows-{copies}"
        folder.mkdir()
        part.to_parquet(folder / "train-0.parquet")
        for i in range(1, copies):
            os.link(folder / "train-0.parquet", folder / f"train-{i}.parquet")
        command = [sys.executable, ROOT / "scripts/train_vit.py", "--recipe=vit-base", "--run=rows"]
        command += [f"--dataset={folder}", f"--model={setting.small_vit()}", "--image_size=32"]
        command += ["--validation_size=0.02", "--max_steps=20", *UNTIMED]
        with _cache_in(setting.folder / f"cache-{copies}") as variables:
            found.append(_peak_megabytes(command, setting.folder / f"run-{copies}", variables))
        shutil.rmtree(folder)
        counts.append(copies * len(part))
        print(f"  {counts[-1]:,} images: {found[-1]:.0f} MB", flush=True)
    return [
        Pair(f"Peak memory at {counts[1]:,} images over that at {counts[0]:,}",
             "times", [found[1] / found[0]], target=1.1,
             sides=f"{found[1]:.0f} and {found[0]:.0f} MB of all processes, mapped files apart"),
    ]  # fmt: skip


def demo(setting: Setting) -> list[Pair]:
    """`make demo` in an empty folder, once the environment is set up."""
    folder = setting.folder / "demo"
    folder.mkdir()
    for path in (".venv", "Makefile", "requirements.txt", "pipeline", "scripts", "space"):
        (folder / path).symlink_to(ROOT / path)
    started = time.monotonic()
    result = subprocess.run(["make", "demo"], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"make demo ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return [Pair("`make demo` after set-up", "s", [time.monotonic() - started], target=180)]


def whole_recipe(setting: Setting) -> list[Pair]:
    """Minutes of `train` by the headline recipe, from decoding to the saved model."""
    options = [f"--dataset={setting.dataset}", "--disable_tqdm=true"]
    if setting.quick:
        options += [f"--model={setting.small_vit()}", *SHORT]
    else:
        options += [f"--model={setting.vit_base()}"]
        options += [f"--torch_compile={torch.accelerator.is_available()}"]
    started = time.monotonic()
    with _no_cache():
        train(load_recipe("vit-base", options, "whole"))
    minutes = (time.monotonic() - started) / 60
    what = "2 steps" if setting.quick else f"{EPOCHS} epochs"
    return [Pair(f"Recipe vit-base, {what}, validation included", "minutes", [minutes],
                 target=None if setting.quick else 3)]  # fmt: skip


def fine_tune(setting: Setting) -> list[Pair]:
    """Test accuracy of a recipe over three seeds."""
    accuracies = []
    for seed in range(SEEDS):
        options = [f"--dataset={setting.dataset}", f"--seed={seed}", "--disable_tqdm=true"]
        if setting.backbone:
            options += [f"--model={setting.backbone}"]
        if setting.quick:
            options += [f"--model={setting.small_vit()}", *SHORT]
        recipe = load_recipe(setting.recipe, options, f"{Path(setting.recipe).stem}-{seed}")
        summary = train(recipe)
        accuracies.append(100 * evaluate(summary["model_folder"], recipe.data)["accuracy"])
        print(f"  seed {seed}: {accuracies[-1]:.2f} %, {summary['wall_s'] / 60:.1f} minutes")
    reach = T_95 * statistics.stdev(accuracies) / SEEDS**0.5
    mean = statistics.mean(accuracies)
    return [
        Pair(f"Test accuracy, recipe {Path(setting.recipe).stem}, three seeds", "%", accuracies,
             least=True, target=None if setting.quick else 97.0,
             sides=f"mean {mean:.2f} %, 95 % interval of the mean {mean - reach:.2f} to "
             f"{mean + reach:.2f} %"),
    ]  # fmt: skip


def _training(
    setting: Setting, backbone: str, size: int, batch: int, warm: int, steps: int,
    what: str, target: float, options: list[str] = (),
) -> list[Pair]:  # fmt: skip
    """Images a second of both sides on one backbone, and our share of waiting for data."""
    repeats = 1 if setting.quick else 3
    raw = setting.raw()
    processor = AutoImageProcessor.from_pretrained(backbone, backend="pil")
    waits = []

    def ours() -> float:
        given = [f"--dataset={setting.dataset}", f"--model={backbone}", f"--image_size={size}"]
        given += [f"--per_device_train_batch_size={batch}", f"--max_steps={warm + steps}"]
        trainer = prepare(load_recipe("vit-base", [*given, *UNTIMED, *options]))
        rate, wait = _throughput(trainer, warm, steps, batch)
        waits.append(100 * wait)
        return rate

    def theirs(tuned: bool) -> float:
        model = example.load_backbone(backbone, raw.features["label"].names)
        trainer = example.build_trainer(
            raw, model, processor, batch, warm + steps, setting.folder / "example", tuned
        )
        return _throughput(trainer, warm, steps, batch)[0]

    found = _alternate(repeats, ours=ours, theirs=lambda: theirs(False), tuned=lambda: theirs(True))
    return [
        Pair(
            f"Training, {what}",
            "images/s",
            *found.values(),
            target=target,
            sides=f"batches of {batch}; tuned: {_listed(example.fast_settings())}",
        ),
        Pair(f"Waiting for data, {what}", "% of a step", waits, target=2),
    ]


def _listed(settings: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


class _StepClock(TrainerCallback):
    """Seconds from the end of step `warm` to the end of step `last`."""

    def __init__(self, warm: int, last: int):
        self.warm, self.last = warm, last
        self.waited = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.warm, self.last) and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        if state.global_step == self.warm:
            self.started, self.waited = time.perf_counter(), 0.0
        if state.global_step == self.last:
            self.seconds = time.perf_counter() - self.started


class _Deadline(TrainerCallback):
    """Ends the training when its time is up."""

    def __init__(self, started: float, seconds: float):
        self.started, self.seconds = started, seconds

    def spent(self) -> float:
        """The share of the time that is used, 0 to 1."""
        return min(1.0, (time.monotonic() - self.started) / self.seconds)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.spent() >= 1


def _by_the_clock(
    how: TrainingArguments, clock: _Deadline, steps: int = 1000
) -> Callable[[int], float]:
    """The schedule of the learning rate, over the time that there is in place of steps."""
    nobody = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = how.get_warmup_steps(steps)
    schedule = get_scheduler(
        how.lr_scheduler_type,
        nobody,
        warmup,
        steps,
        scheduler_specific_kwargs=how.lr_scheduler_kwargs,
    )
    return lambda _: schedule.lr_lambdas[0](steps * clock.spent())


def _throughput(trainer, warm: int, steps: int, batch: int) -> tuple[float, float]:
    """Images a second after the first `warm` steps, and the share of waiting for the loader."""
    clock = _StepClock(warm, warm + steps)
    trainer.add_callback(clock)
    draw = trainer.get_batch_samples

    def timed_draw(*arguments):
        started = time.perf_counter()
        batches = draw(*arguments)
        clock.waited += time.perf_counter() - started
        return batches

    trainer.get_batch_samples = timed_draw
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return batch * steps / clock.seconds, clock.waited / clock.seconds


def _right(trainer, setting: Setting) -> tuple[int, int]:
    """How many of the test split are right, of how many; both sides in bfloat16 if fast here."""
    processor = trainer.processing_class
    size = processor.size["height"]
    recipe = load_recipe("cpu", [f"--dataset={setting.dataset}"])
    test = load_splits(recipe.data, size, processor.resample, only="test")["test"]
    fast = environment.fast_bfloat16()
    logits, labels = predict(trainer.model, processor, test, bf16=fast)
    return int((logits.argmax(dim=1) == labels).sum()), len(labels)


def _alternate(repeats: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    found = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            found[name].append(measure())
    return found


def _rate(work: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def _bytes_on_disk(dataset: datasets.Dataset) -> int:
    # Kept in memory, as the digits are, it is what a file would take.
    files = [os.path.getsize(file["filename"]) for file in dataset.cache_files]
    return sum(files) or dataset.data.nbytes


def _remove(mapped: list[datasets.Dataset]) -> None:
    for dataset in mapped:
        for file in dataset.cache_files:
            Path(file["filename"]).unlink(missing_ok=True)
    mapped.clear()


@contextlib.contextmanager
def _no_cache():
    """Each `map` does its work anew."""
    datasets.disable_caching()
    try:
        yield
    finally:
        datasets.enable_caching()


@contextlib.contextmanager
def _cache_in(folder: Path):
    """Environment variables for a cache of its own, which goes afterwards."""
    yield os.environ | {"HF_DATASETS_CACHE": str(folder)}
    shutil.rmtree(folder, ignore_errors=True)


def _peak_megabytes(command: list, folder: Path, variables: dict[str, str]) -> float:
    """The most memory that a command and its children held at once, looked at 20 times a second.

    Without mapped files: the kernel takes their pages back as it needs them.
    """
    folder.mkdir()
    log = folder / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=output)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            pids = [process.pid, *(child.pid for child in children)]
            peak = max(peak, sum(map(_anonymous_kb, pids)))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{command[1]} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return peak / 1024


def _anonymous_kb(pid: int) -> int:
    """Its share of what it holds, so that pages shared with a parent count once."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon"):
                return int(line.split()[1])
    return 0
