"""What a run shows: scalars and pictures in TensorBoard (through Accelerate's trackers), a progress
bar."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text
from torch import Tensor

from mcir.evaluation.evaluate import Picture
from mcir.evaluation.pictures import side_by_side


class Tracker:
    """Writes for the main process, is silent on the others. Use as a context."""

    def __init__(self, accelerator: Accelerator, run_dir: Path, first_step: int, num_steps: int) -> None:
        self.accelerator, self.run_dir, self.console = accelerator, run_dir, Console()
        accelerator.project_configuration.set_directories(str(run_dir))
        if accelerator.is_main_process:
            from accelerate.tracking import TensorBoardTracker

            # Scalars of steps that are trained again after a resume replace the earlier ones.
            tracker = TensorBoardTracker("tensorboard", logging_dir=str(run_dir), purge_step=first_step)
            tracker.start()
            accelerator.trackers = [tracker]
        self.progress = Progress(
            *columns(),
            expand=True,
            console=self.console,
            disable=not accelerator.is_main_process or not self.console.is_terminal,
        )
        self._task = self.progress.add_task("train", total=num_steps, completed=first_step - 1, rate="", status="")
        self.num_steps = num_steps

    def __enter__(self) -> "Tracker":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def advance(self) -> None:
        self.progress.advance(self._task)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.accelerator.log(dict(values), step=step)

    def status(self, step: int, losses: Mapping[str, float], share: float | None, speed: Mapping[str, float]) -> None:
        """The line beside the progress bar; a line of its own where there is no terminal. `share` is the contrast's, of
        the reconstruction loss; `speed` as the meter has it."""
        rate, wait = f"{speed['images_per_s']:.1f} images/s", f"data wait {speed['data_wait']:.0%}"
        shown = [f"{name} {value:.4g}" for name, value in losses.items()]
        shown += [f"contrast's share {share:.2%}"] if share is not None else []
        self.progress.update(self._task, rate=rate, status="  ".join([*shown, wait]))
        text = "  ".join([*shown, rate, wait])
        if self.accelerator.is_main_process and not self.console.is_terminal:
            print(f"step {step}/{self.num_steps}  {text}", flush=True)

    def message(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.progress.print(text, highlight=False, soft_wrap=True)

    def pictures(self, step: int, name: str, pictures: Sequence[Picture], negatives: Sequence[Tensor]) -> None:
        """Rows of degraded | negative (where there is one) | restored | clean | difference (x 4), in TensorBoard."""
        for i, picture in enumerate(pictures):
            past = {"negative": negatives[i]} if i < len(negatives) else {}
            difference = (4 * (picture.restored - picture.clean).abs()).clamp(max=1)
            shown = {"degraded": picture.degraded, **past, "restored": picture.restored, "clean": picture.clean}
            row = side_by_side(shown | {"difference x 4": difference}, [picture.restored, picture.clean])
            for tracker in self.accelerator.trackers:
                tracker.log_images({f"{name}/{picture.key}": row[None]}, step=step, dataformats="NCHW")


def columns() -> list[ProgressColumn]:
    """Of the progress bar: where the terminal is narrow, what is last is cut; step, rate and time left never are."""
    whole: list[ProgressColumn] = [
        TextColumn("step", table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
        TextColumn("left", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    ]
    return [*whole, BarColumn(10), _Cut("{task.fields[status]}")]


class _Cut(TextColumn):
    """Text that takes what room is left, on one line."""

    def get_table_column(self) -> Column:
        return Column(ratio=1, no_wrap=False, overflow="ellipsis")

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Meter:
    """Means between two log steps. Losses stay on the device; the clock is the host's."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.num_images, self.waited, self.paused, self.since = 0, 0, 0.0, 0.0, time.perf_counter()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training (validating, saving): counted by itself."""
        begun = time.perf_counter()
        yield
        self.paused += time.perf_counter() - begun

    def add(self, losses: Mapping[str, Tensor], num_images: int, waited: float) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps, self.num_images, self.waited = self.steps + 1, self.num_images + num_images, self.waited + waited

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, float]]:
        """Mean losses over steps and ranks, and what the time went into: `images_per_s` and `data_wait` (a share) of
        training, `maintenance`, the share of all time that was no training. Collective; waits for the device."""
        stacked = accelerator.reduce(torch.stack(list(self.sums.values())), "mean") / self.steps
        losses = dict(zip(self.sums, stacked.tolist(), strict=True))
        elapsed = time.perf_counter() - self.since
        training = elapsed - self.paused
        speed = {"images_per_s": self.num_images / training, "data_wait": self.waited / training}
        speed["maintenance"] = self.paused / elapsed
        self.reset()
        return losses, speed


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: the device's, or the resident memory without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
