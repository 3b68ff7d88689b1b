"""A study drawn: differences with their intervals, and learning curves by arm. PNG, without a display."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mcir.evaluation.plots import draw_differences, figure, label_rows, to_png
from mcir.study.results import Results, Run, paired
from mcir.study.statistics import CONFIDENCE


def differences_png(results: Results) -> bytes:
    """A panel for each set, a row for each arm: a dot for each seed, the mean, and Student's interval over seeds."""
    plan = results.plan
    sets = list(dict.fromkeys(line.data for line in results.lines if line.metric == "psnr"))
    arms = [arm for arm in plan.arms if arm != plan.first]
    whole, panels = figure(1, max(1, len(sets)), 1.2 + 0.45 * len(arms))
    for panel, data in zip(panels[0], sets, strict=False):
        for line in results.lines:
            if line.data != data or line.metric != "psnr" or line.comparison is None:
                continue
            row, found = arms.index(line.arm), line.comparison
            by_seed = paired(results.runs, line.arm, plan.first, data, "psnr").mean(axis=1)
            draw_differences(panel, row, by_seed, found)
        label_rows(panel, arms)
        panel.set_title(data)
        panel.set_xlabel(f"PSNR, dB, difference from {plan.first} ({CONFIDENCE:.0%})")
    return to_png(whole)


def curves_png(results: Results) -> bytes:
    """For each set, over the steps: the arms' means over seeds, and below their mean paired differences from the first
    arm, with the range over seeds."""
    plan = results.plan
    sets = list(dict.fromkeys(line.data for line in results.lines if line.metric == "psnr"))
    whole, panels = figure(2, max(1, len(sets)), 6)
    for column, data in enumerate(sets):
        first = _curves(results.of(plan.first), data)
        for i, arm in enumerate(plan.arms):
            own = _curves(results.of(arm), data)
            _draw(panels[0][column], list(own.values()), f"C{i}", arm)
            if arm != plan.first:
                shared = [
                    {step: curve[step] - first[seed][step] for step in curve if step in first[seed]}
                    for seed, curve in own.items()
                    if seed in first
                ]
                _draw(panels[1][column], shared, f"C{i}", arm)
        panels[0][column].set_title(data)
        panels[0][column].set_ylabel("PSNR, dB")
        panels[0][column].legend(fontsize="small")
        panels[1][column].axhline(0, color="0.4", linewidth=1)
        panels[1][column].set_ylabel(f"difference from {plan.first}")
        panels[1][column].set_xlabel("step")
    return to_png(whole)


def _curves(runs: Sequence[Run], data: str) -> dict[int, dict[int, float]]:
    """Seed -> step -> mean over images, of finished runs."""
    return {
        run.task.seed: {step: sets[data].mean()["psnr"] for step, sets in run.curve.items()}
        for run in runs
        if run.state == "finished"
    }


def _draw(panel: Any, curves: Sequence[dict[int, float]], color: str, label: str) -> None:
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if steps:
        values = np.array([[curve[step] for step in steps] for curve in curves])  # (S, steps)
        panel.plot(steps, values.mean(axis=0), color=color, label=label)
        panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.12, linewidth=0)
