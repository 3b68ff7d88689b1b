"""Paired differences drawn, as PNG, without a display."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from mcir.evaluation.report import CONFIDENCE, Report, difference


def differences_png(report: Report) -> bytes:
    """PSNR differences in dB, a row for each set and pair."""
    rows = [
        (f"{name}: {network} - {reference}", scores[network].values["psnr"], scores[reference].values["psnr"])
        for name, scores in report.scores.items()
        for network, reference in report.pairs
    ]
    whole, panels = figure(1, 1, 1.2 + 0.45 * len(rows), width=9)
    for row, (_, values, reference) in enumerate(rows):
        draw_differences(panels[0][0], row, np.subtract(values, reference), difference(values, reference))
    label_rows(panels[0][0], [label for label, _, _ in rows])
    panels[0][0].set_xlabel(f"difference of an image, and of the mean ({CONFIDENCE:.0%}); PSNR, dB")
    return to_png(whole)


def draw_differences(panel: Any, row: int, deltas: Any, found: Any) -> None:
    """A dot for each of `deltas` (N,), a bar for the interval of `found` (mean, low, high), a tick for its mean. What
    is not finite has no place."""
    if np.isfinite(found.low):
        panel.plot([found.low, found.high], [row, row], color="C0", linewidth=5, alpha=0.35, solid_capstyle="butt")
    finite = np.asarray(deltas)[np.isfinite(deltas)]
    panel.plot(finite, np.full(len(finite), row), "o", color="C0", markersize=4, fillstyle="none")
    if np.isfinite(found.mean):
        panel.plot([found.mean], [row], "|", color="C3", markersize=16, markeredgewidth=2)


def label_rows(panel: Any, labels: Sequence[str]) -> None:
    """The rows from above, and a line at zero."""
    panel.axvline(0, color="0.4", linewidth=1)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)


def figure(num_rows: int, num_columns: int, height: float, width: float = 5) -> tuple[Any, Any]:
    """A figure of its own, which no window system and no global state of matplotlib's knows, and its panels; inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(1 + width * num_columns, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(num_rows, num_columns, squeeze=False)


def to_png(made: Any) -> bytes:
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
