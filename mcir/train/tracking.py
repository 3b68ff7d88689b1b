"""What a run shows: scalars and pictures in TensorBoard and other trackers, a progress bar."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
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

from mcir.config import RunConfig, dump
from mcir.errors import UserError
from mcir.evaluation.evaluate import Picture
from mcir.evaluation.pictures import side_by_side
from mcir.train import dashboard, trackers
from mcir.train.record import Record

WITHOUT_EFFECT = ("name", "runs_dir", "checkpoint", "tracking", "validation", "watch", "compute")
"""Sections that are left out of the HParams tab: what is learnt does not depend on them."""


class Tracker:
    """Writes for the main process, is silent on the others. Use as a context.

    A tracker that fails (its server is gone, its disk full) costs no training: it is let go with a sentence, and if it
    was the last, TensorBoard takes its place. Only at the run's first start, with somebody there to mend it, is that a
    UserError.
    """

    def __init__(
        self, accelerator: Accelerator, config: RunConfig, run_dir: Path, record: Record, first_step: int
    ) -> None:
        self.accelerator, self.config, self.run_dir, self.record = accelerator, config, run_dir, record
        self.first_step, self.num_steps, self.console = first_step, config.steps, Console(markup=False)
        self._lost: list[GeneralTracker] = []
        self.progress = Progress(
            *columns(),
            expand=True,
            console=self.console,
            disable=not accelerator.is_main_process or not self.console.is_terminal,
        )
        done = first_step - 1
        self._task = self.progress.add_task("train", total=config.steps, completed=done, rate="", status="")

    def __enter__(self) -> "Tracker":
        self.accelerator.project_configuration.set_directories(str(self.run_dir))
        self.accelerator.trackers = []
        for name in self.config.tracking.to if self.accelerator.is_main_process else ():
            try:
                self._open(name)
            except Exception as error:
                if name not in self.record.trackers:
                    self._finish("FAILED")
                    raise UserError(f"tracking.to: {name} could not be started: {_first_line(error)}") from error
                self._lose(name, error)
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        done = self.progress.tasks[self._task].completed >= self.num_steps
        self._finish("FAILED" if kind else "FINISHED" if done else "KILLED")

    def _open(self, name: str) -> None:
        run_id = self.record.trackers.get(name)
        tracker = trackers.start(name, self.run_dir, self.config.tracking.project, self.first_step, run_id)
        self.accelerator.trackers.append(tracker)
        values = self.config.model_dump(mode="json")
        if name == "tensorboard":
            learnt = {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
            settings = {"objective.contrast.name": "none"} | trackers.flat(learnt)  # named, for it to differ
            dashboard.describe(tracker.tracker, self.run_dir.name, settings, dump(self.config), self.first_step - 1)
        else:
            trackers.configure(tracker, trackers.flat(values), self.run_dir / "config.yaml", run_id is None)
        if (found := trackers.id_of(tracker)) is not None:
            self.record.trackers[name] = found
            self.record.update(trackers=self.record.trackers)

    def _tell(self, what: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                what(tracker)
            except Exception as error:  # of whatever kind the client's are: none is worth the run
                self._lose(tracker.name, error)

    def _lose(self, name: str, error: Exception) -> None:
        self._lost += [tracker for tracker in self.accelerator.trackers if tracker.name == name]
        self.accelerator.trackers = [tracker for tracker in self.accelerator.trackers if tracker.name != name]
        instead = ""
        if not self.accelerator.trackers and all(tracker.name != "tensorboard" for tracker in self._lost):
            with suppress(OSError):  # a disk that is full, too: the next checkpoint says so
                self._open("tensorboard")
                instead = ", its curves from here on are in TensorBoard"
        self.message(
            f"{name} failed ({_first_line(error)}): the run goes on without it{instead}; a resume tries it again"
        )

    def _finish(self, status: str) -> None:
        for tracker in [*self.accelerator.trackers, *self._lost]:
            try:
                if tracker.name == "tensorboard" and status == "FINISHED":
                    dashboard.close(tracker.tracker)
                trackers.finish(tracker, status)
            except Exception as error:
                if tracker not in self._lost:
                    self.message(
                        f"{tracker.name} could not be closed ({_first_line(error)}): it may lack the last steps"
                    )
        self.accelerator.trackers, self._lost = [], []

    def advance(self) -> None:
        self.progress.advance(self._task)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._tell(lambda tracker: trackers.log(tracker, values, step))

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

    @property
    def curves(self) -> str:
        """Where to look at them."""
        there = [
            f"tensorboard --logdir {self.run_dir.parent}" if name == "tensorboard" else name
            for name in self.config.tracking.to
        ]
        return "curves: " + ", ".join(there) if there else "no curves"

    def message(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.progress.print(text, highlight=False, soft_wrap=True)

    def pictures(self, step: int, name: str, pictures: Sequence[Picture], negatives: Sequence[Tensor]) -> None:
        """Rows of degraded | negative (where there is one) | restored | clean | difference (x 4)."""
        for i, picture in enumerate(pictures):
            past = {"negative": negatives[i]} if i < len(negatives) else {}
            difference = (4 * (picture.restored - picture.clean).abs()).clamp(max=1)
            shown = {"degraded": picture.degraded, **past, "restored": picture.restored, "clean": picture.clean}
            row = side_by_side(shown | {"difference x 4": difference}, [picture.restored, picture.clean])
            pixels = (row * 255).round().byte().permute(1, 2, 0).numpy()  # (H, W, 3)
            self._tell(partial(trackers.show, name=f"{name}/{picture.key}", picture=pixels, step=step))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


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
        return torch.cuda.max_memory_reserved(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
