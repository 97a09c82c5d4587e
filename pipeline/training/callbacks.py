"""`Trainer` callbacks: readable logs, and stopping on signals or when training diverges."""

import math
import signal
import threading
import time

from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from pipeline.errors import UserError

CHECK_EVERY = 10  # steps between checks whether any of several processes received a signal


class ProgressLines(ProgressCallback):
    """The default progress bar, with a readable line for each log entry."""

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
    """Add `wall_s` to each log entry: seconds of training so far, including before a resume."""

    start: float  # set by `ImageTrainer.train`

    def on_train_begin(self, args, state, control, **kwargs):
        self.start -= max((entry.get("wall_s", 0) for entry in state.log_history), default=0)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["wall_s"] = round(time.monotonic() - self.start, 1)


class StopOnDivergence(TrainerCallback):
    """End training when the loss is no longer finite."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise UserError(
                    f"Training diverged: {name} is {logs[name]} at step {state.global_step}. Lower "
                    f"learning_rate ({args.learning_rate:g}), raise warmup_steps, or train in "
                    "float32 (--bf16=false --fp16=false)."
                )


class StopOnSignal(TrainerCallback):
    """Save a checkpoint and end training after SIGTERM or SIGINT, for example on preemption.

    transformers' `enable_jit_checkpoint` handles only SIGTERM, and then continues as if training
    had finished. A second signal ends the process immediately.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received, self.stopped = False, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def on_step_end(self, args, state, control, **kwargs):
        stop = self.received
        if self.accelerator.num_processes > 1:
            if self.received:
                self.accelerator.set_trigger()
            stop = state.global_step % CHECK_EVERY == 0 and self.accelerator.check_trigger()
        if stop and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
