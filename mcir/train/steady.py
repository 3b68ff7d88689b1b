"""What keeps many ranks in step, and says which one does not keep up."""

import gc
import time
from types import TracebackType

import torch
from accelerate import Accelerator

COLLECT_EVERY = 200
"""Steps between two runs of Python's garbage collector."""
UNEVEN = 1.25
"""So many times the fastest rank's time make the slowest worth a word."""


class SteadyCollector:
    """Has Python's garbage collector run at the same step on all ranks: left alone it stops one rank here and another
    there, and each time all of them wait. Use as a context."""

    def __enter__(self) -> "SteadyCollector":
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._was_enabled:
            gc.enable()

    def collect(self, step: int) -> None:
        if step % COLLECT_EVERY == 0:
            gc.collect(1)


class Pace:
    """Time that a rank spends before it has to wait for others: for its data and in the forward pass, where nothing is
    gathered (fsdp2 and zero3 gather weights there, so that only their data wait tells ranks apart). Use as a context
    around the forward pass; on a GPU it is the device's time, read at log steps alone."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds, self._begun = 0.0, 0.0

    def __enter__(self) -> "Pace":
        if self._on_gpu:
            self._marks.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._marks[-1][0].record()
        else:
            self._begun = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._on_gpu:
            self._marks[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._begun

    def read(self, accelerator: Accelerator, waited: float) -> tuple[float, int]:
        """The slowest rank's time over the fastest's since the last reading, `waited` seconds for data included, and
        which rank it is. Collective; call it when the device has been waited for."""
        own = waited + self._seconds + sum(begin.elapsed_time(end) for begin, end in self._marks) / 1e3
        self._marks, self._seconds = [], 0.0
        seconds = accelerator.gather(torch.tensor([own], dtype=torch.float64, device=accelerator.device))
        return float(seconds.max() / seconds.min().clamp(min=1e-9)), int(seconds.argmax())
