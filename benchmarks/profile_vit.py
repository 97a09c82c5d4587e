"""Where the time goes: the phases of a training step and of an evaluation, and the operations."""

import argparse
import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipeline.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any key of a recipe can be given too, as --per_device_train_batch_size=16.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", default="cpu", help="its name, or a YAML file")
    parser.add_argument("--steps", type=int, default=6, help="training steps that count")
    parser.add_argument("--images", type=int, default=1024, help="images that are scored")
    arguments, overrides = parser.parse_known_args()

    # After the arguments: these take seconds.
    from benchmark_rows import UNTIMED
    from transformers import PrinterCallback
    from transformers.utils import logging

    from pipeline import environment, evaluation, training
    from pipeline.recipe import load_recipe

    logging.set_verbosity_error()
    warm = 2
    steps = [f"--max_steps={warm + arguments.steps}"]
    recipe = load_recipe(arguments.recipe, [*UNTIMED, *overrides, *steps])
    with tempfile.TemporaryDirectory() as folder:
        recipe.training.output_dir = folder
        trainer = training.prepare(recipe)
        trainer.remove_callback(PrinterCallback)
        phases = Phases()
        for owner, method, phase in (
            (trainer, "get_batch_samples", "wait for data"),
            (trainer, "_prepare_inputs", "augment, resize, normalise"),
            (trainer, "training_step", "forward and loss"),
            (trainer.accelerator, "backward", "backward"),
            (trainer, "_clip_grad_norm", "clip gradients"),
        ):
            phases.watch(owner, method, phase)
        create = trainer.create_optimizer

        def create_watched(*given, **named):
            optimizer = create(*given, **named)
            phases.watch(optimizer, "step", "optimizer")
            return optimizer

        trainer.create_optimizer = create_watched
        trainer.add_callback(phases.from_step(warm))
        with operations() as found:
            trainer.train()
    count = arguments.steps * recipe.training.per_device_train_batch_size
    print(f"{environment.hardware()}, recipe {arguments.recipe}, {recipe.model.image_size} px\n")
    print(f"A training step, {count / phases.elapsed():.1f} images/s, profiled")
    print(phases.table(phases.elapsed()))
    print(f"  operations, all steps: {shares(found)}\n")

    test = trainer.eval_dataset.dataset
    test = test.select(range(min(len(test), arguments.images)))
    phases = Phases()
    phases.watch(evaluation, "preprocess", "resize, normalise")
    # Without the precision that it was trained in.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    phases.watch(model, "forward", "forward")
    with operations() as found:
        started = now()
        evaluation.predict(model, trainer.processing_class, test)
        seconds = now() - started
    print(f"An evaluation in float32, {len(test) / seconds:.1f} images/s, profiled")
    print(phases.table(seconds))
    print(f"  operations: {shares(found)}")


def now() -> float:
    """The clock, when the device has done all that it was given."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Phases:
    """Seconds spent in functions that are watched, less what is watched within them."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.within: list[float] = []

    def watch(self, owner, method: str, phase: str) -> None:
        inner: Callable = getattr(owner, method)

        def watched(*given, **named):
            self.within.append(0.0)
            started = now()
            try:
                return inner(*given, **named)
            finally:
                took = now() - started
                self.seconds[phase] += took - self.within.pop()
                if self.within:
                    self.within[-1] += took

        setattr(owner, method, watched)

    def from_step(self, warm: int):
        """A callback that begins to count after step `warm`."""
        from transformers import TrainerCallback

        phases = self

        class Count(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == warm:
                    phases.seconds.clear()
                    phases.started = now()
                phases.ended = now()

        return Count()

    def elapsed(self) -> float:
        return self.ended - self.started

    def table(self, whole: float) -> str:
        rows = sorted(self.seconds.items(), key=lambda row: -row[1])
        rows.append(("all else", whole - sum(self.seconds.values())))
        return "\n".join(f"  {phase:28}{seconds / whole:6.1%}" for phase, seconds in rows)


@contextlib.contextmanager
def operations():
    from torch.profiler import profile

    with profile() as profiler:
        yield profiler


def shares(profiler, most: int = 8) -> str:
    """Of the device's time, or the CPU's where it does the work."""
    events = profiler.key_averages()
    times = {event.key.removeprefix("aten::"): event.self_device_time_total for event in events}
    if not sum(times.values()):
        times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in events}
    first = sorted(times, key=times.get, reverse=True)[:most]
    return ", ".join(f"{name} {times[name] / sum(times.values()):.0%}" for name in first)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
