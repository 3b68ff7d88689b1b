"""What the runs of a study left on the disk, put side by side. Nothing here trains or restores: the report can be made
again from the runs' directories alone."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mcir.errors import UserError
from mcir.evaluation.evaluate import Scores
from mcir.study.execute import read_costs
from mcir.study.plan import Plan, Task
from mcir.study.statistics import Comparison, compare
from mcir.train import scores

NOT_BEGUN = "not begun"


@dataclass(frozen=True)
class Run:
    """A task and what became of it."""

    task: Task
    state: str
    """That of its record, or NOT_BEGUN."""
    message: str | None = None
    step: int = 0
    images_per_s: float | None = None
    on_gpu: bool = False
    hours: float | None = None
    """GPU hours; where there is no GPU, processor hours. All starts together, validation included."""
    curve: dict[int, dict[str, Scores]] = field(default_factory=dict)
    """Set -> scores of each validation, by step."""

    @property
    def scores(self) -> dict[str, Scores] | None:
        """Of the last step, by set; None unless the run is finished."""
        return self.curve[self.task.config.steps] if self.state == "finished" else None


@dataclass(frozen=True)
class Line:
    """One arm on one set in one metric."""

    data: str
    metric: str
    arm: str
    num_seeds: int
    """Finished runs."""
    mean: float
    deviation: float
    """Of the runs' means, over seeds; NaN for one."""
    comparison: Comparison | None
    """With the first arm, over the seeds that both have finished; None for the first arm itself."""


@dataclass(frozen=True)
class Results:
    """All runs, and the lines of the tables."""

    plan: Plan
    runs: list[Run]
    lines: list[Line]

    def of(self, arm: str) -> list[Run]:
        return [run for run in self.runs if run.task.arm == arm]

    def cost(self, arm: str) -> tuple[float | None, float | None]:
        """Images/s (median over runs) and hours of all finished runs of an arm."""
        done = [run for run in self.of(arm) if run.state == "finished"]
        speeds = [run.images_per_s for run in done if run.images_per_s is not None]
        hours = [run.hours for run in done]
        known = [h for h in hours if h is not None]
        return (
            statistics.median(speeds) if speeds else None,
            sum(known) if known and len(known) == len(hours) else None,
        )


def collect(plan: Plan) -> Results:
    """Reads the runs. UserError for a finished run without scores, or with those of other images."""
    runs = [_read(task) for task in plan.tasks]
    return Results(plan, runs, _lines(plan, runs))


def paired(runs: Sequence[Run], arm: str, first: str, data: str, metric: str) -> np.ndarray:
    """Differences of an arm from the first one: a row for each seed that both have finished, a column an image."""
    by_seed = {
        name: {run.task.seed: run.scores[data] for run in runs if run.task.arm == name and run.scores is not None}
        for name in (arm, first)
    }
    rows = []
    for seed, own in by_seed[arm].items():
        other = by_seed[first].get(seed)
        if other is None:
            continue
        if own.keys != other.keys:
            raise UserError(f"{data}: arms {arm} and {first} were measured on other images with seed {seed}")
        with np.errstate(invalid="ignore"):  # both restored perfectly: inf - inf
            rows.append(np.subtract(own.values[metric], other.values[metric]))
    return np.stack(rows) if rows else np.empty((0, 0))


def _read(task: Task) -> Run:
    record = task.record
    if record is None:
        return Run(task, NOT_BEGUN)
    curve = scores.load(task.run_dir, task.config.steps)
    state = record["state"]
    if state == "finished" and task.config.steps not in curve:
        raise UserError(f"{task.run_dir}: is finished, but its validation of step {task.config.steps} is gone")
    costs = read_costs(task)
    return Run(
        task,
        state,
        record["message"],
        record["step"],
        record["images_per_s"],
        any(cost["gpu"] for cost in costs),
        _hours(costs) if len(costs) == len(record["starts"]) else None,
        curve,
    )


def _hours(costs: Sequence[dict[str, Any]]) -> float:
    return sum(cost["wall_s" if cost["gpu"] else "cpu_s"] for cost in costs) / 3600


def _lines(plan: Plan, runs: Sequence[Run]) -> list[Line]:
    lines = []
    measured = next((run.scores for run in runs if run.scores is not None), {})
    for data, any_scores in measured.items():
        for metric in any_scores.values:
            for arm in plan.arms:
                means = [r.scores[data].mean()[metric] for r in runs if r.task.arm == arm and r.scores is not None]
                if not means:
                    continue
                deviation = float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")
                comparison = None
                if arm != plan.first:
                    pairs = paired(runs, arm, plan.first, data, metric)
                    comparison = compare(pairs) if len(pairs) else None
                lines.append(Line(data, metric, arm, len(means), float(np.mean(means)), deviation, comparison))
    return lines
