"""SIGTERM and Ctrl-C end a training after its step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback


class Stopped(RuntimeError):  # noqa: N818
    """A signal ended a run, after a checkpoint; ``signal`` is its number."""

    def __init__(self, number: int, step: int):
        self.signal = number
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped after step {step}, which is saved. Go on by --resume.")


class Signals:
    """What signals came while training; a second one ends a program of one process at once."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # A launcher of several processes sends a signal again that its processes have had.
        if os.environ.get("WORLD_SIZE", "1") == "1":
            signal.signal(number, self._before[number])

    def on_any_rank(self, accelerator: Accelerator) -> int:
        """The signal that one of the ranks has had; the same on all, 0 for none."""
        if accelerator.num_processes > 1:
            own = torch.tensor([self.received], dtype=torch.int64, device=accelerator.device)
            self.received = int(accelerator.gather(own).max())
        return self.received


class SaveAndStop(TrainerCallback):
    """Ends the training after the step in which a signal came."""

    def __init__(self, signals: Signals, accelerator: Accelerator):
        self.signals, self.accelerator = signals, accelerator

    def on_step_end(self, args, state, control, **kwargs):
        """The count is already that of the next step."""
        if self.signals.on_any_rank(self.accelerator):
            control.should_save = control.should_training_stop = True
