"""A study drawn: differences with their intervals, and learning curves by arm. PNG, without a display."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from mcir.study.results import Results, Run, paired
from mcir.study.statistics import CONFIDENCE


def differences_png(results: Results, metric: str = "psnr") -> bytes:
    """A panel for each set, a row for each arm: a dot for each seed, the mean, and Student's interval over seeds."""
    plan = results.plan
    sets = list(dict.fromkeys(line.data for line in results.lines if line.metric == metric))
    arms = [arm for arm in plan.arms if arm != plan.first]
    figure, panels = _figure(1, max(1, len(sets)), 1.2 + 0.45 * len(arms))
    for panel, data in zip(panels[0], sets, strict=False):
        panel.axvline(0, color="0.4", linewidth=1)
        for line in results.lines:
            if line.data != data or line.metric != metric or line.comparison is None:
                continue
            row, found = arms.index(line.arm), line.comparison
            by_seed = paired(results.runs, line.arm, plan.first, data, metric).mean(axis=1)
            panel.plot([found.low, found.high], [row, row], color="C0", linewidth=5, alpha=0.35, solid_capstyle="butt")
            panel.plot(by_seed, np.full(len(by_seed), row), "o", color="C0", markersize=4, fillstyle="none")
            panel.plot([found.mean], [row], "|", color="C3", markersize=16, markeredgewidth=2)
        panel.set_yticks(range(len(arms)), arms)
        panel.set_ylim(len(arms) - 0.5, -0.5)
        panel.set_title(data)
        panel.set_xlabel(f"{_label(metric)}, difference from {plan.first} ({CONFIDENCE:.0%})")
    return _png(figure)


def curves_png(results: Results, metric: str = "psnr") -> bytes:
    """For each set, over the steps: the arms' means over seeds, and below their mean paired differences from the first
    arm, with the range over seeds."""
    plan = results.plan
    sets = list(dict.fromkeys(line.data for line in results.lines if line.metric == metric))
    figure, panels = _figure(2, max(1, len(sets)), 6)
    for column, data in enumerate(sets):
        first = _curves(results.of(plan.first), data, metric)
        for i, arm in enumerate(plan.arms):
            own = _curves(results.of(arm), data, metric)
            _draw(panels[0][column], list(own.values()), f"C{i}", arm)
            if arm != plan.first:
                shared = [
                    {step: curve[step] - first[seed][step] for step in curve if step in first[seed]}
                    for seed, curve in own.items()
                    if seed in first
                ]
                _draw(panels[1][column], shared, f"C{i}", arm)
        panels[0][column].set_title(data)
        panels[0][column].set_ylabel(_label(metric))
        panels[0][column].legend(fontsize="small")
        panels[1][column].axhline(0, color="0.4", linewidth=1)
        panels[1][column].set_ylabel(f"difference from {plan.first}")
        panels[1][column].set_xlabel("step")
    return _png(figure)


def _curves(runs: Sequence[Run], data: str, metric: str) -> dict[int, dict[int, float]]:
    """Seed -> step -> mean over images, of finished runs."""
    return {
        run.task.seed: {step: sets[data].mean()[metric] for step, sets in run.curve.items()}
        for run in runs
        if run.state == "finished"
    }


def _draw(panel: Any, curves: Sequence[dict[int, float]], color: str, label: str) -> None:
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if steps:
        values = np.array([[curve[step] for step in steps] for curve in curves])  # (S, steps)
        panel.plot(steps, values.mean(axis=0), color=color, label=label)
        panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.12, linewidth=0)


def _label(metric: str) -> str:
    return f"{metric.upper()}, dB" if metric == "psnr" else metric.upper()


def _figure(num_rows: int, num_columns: int, height: float) -> tuple[Any, Any]:
    """A figure of its own, which no window system and no global state of matplotlib's knows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 5 * num_columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
