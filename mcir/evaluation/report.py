"""What was measured, for people and for programs: tables, CSV, JSON, a plot, pictures side by side.

Networks are compared image by image. The interval of a mean difference is Student's t over the images of the set, 95 %:
it says how far the difference depends on which images the set happens to hold, not how another training run would end.
"""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from mcir.errors import UserError
from mcir.evaluation.evaluate import Scores
from mcir.weights.files import replacing

CONFIDENCE = 0.95
COMPARISON_NOTE = (
    f"Mean difference over the same images ± its {CONFIDENCE:.0%} interval (Student's t); *: leaves out 0."
)
DIGITS = {"psnr": 2, "ssim": 4}


@dataclass(frozen=True)
class Report:
    """Scores by set and network; `about` holds all that they depend on, ready for JSON."""

    scores: Mapping[str, Mapping[str, Scores]]
    """Set -> network -> values; the same networks in the same order everywhere, the baseline first."""
    has_baseline: bool
    about: Mapping[str, Any]
    published: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """Set -> whose -> PSNR in dB and SSIM, to be shown beside what was measured."""
    lower_is_better: frozenset[str] = frozenset()
    """The metrics of which less is better."""
    further: tuple[str, ...] = ()
    """The metrics beside PSNR and SSIM."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("psnr", "ssim", *self.further)

    @property
    def heads(self) -> list[str]:
        """The metrics as columns are called."""
        return ["PSNR, dB", "SSIM", *(f"{m.upper()} {'↓' if m in self.lower_is_better else '↑'}" for m in self.further)]

    @property
    def failures(self) -> list[str]:
        """Images that are left out everywhere, a sentence each."""
        return [why for scores in self.scores.values() for why in next(iter(scores.values())).failed.values()]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(network, what it is compared with): all with the first network, and with the baseline."""
        names = list(next(iter(self.scores.values())))
        networks = names[1:] if self.has_baseline else names
        first = [(name, networks[0]) for name in networks[1:]]
        return first + ([(name, names[0]) for name in networks] if self.has_baseline else [])


@dataclass(frozen=True)
class Difference:
    """Mean over images of (network - reference), and the ends of its interval (NaN for fewer than two images)."""

    mean: float
    low: float
    high: float


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Paired, of the same images in the same order."""
    from scipy.stats import t

    deltas = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    mean, count = float(deltas.mean()), len(deltas)
    if count < 2:
        return Difference(mean, math.nan, math.nan)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1) * deltas.std(ddof=1)) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half)


def results_table(report: Report) -> Table:
    """Sets by networks, PSNR, SSIM and further metrics, and what is published of the set."""
    table = Table("set", "images", "weights", *report.heads)
    for name, scores in report.scores.items():
        for i, (network, values) in enumerate(scores.items()):
            means = values.mean()
            head = (name, str(len(values.keys))) if i == 0 else ("", "")
            table.add_row(*head, network, *(f"{means[m]:.{DIGITS.get(m, 4)}f}" for m in report.metrics))
        for whose, (psnr, ssim) in report.published.get(name, {}).items():
            table.add_row("", "", f"published: {whose}", f"{psnr:.2f}", f"{ssim:.4f}")
        table.add_section()
    return table


def comparison_table(report: Report) -> Table:
    """Paired differences with half the length of their intervals; a star where the interval leaves out zero."""
    table = Table("set", "weights", "against", *report.heads)
    for name, scores in report.scores.items():
        for i, (network, reference) in enumerate(report.pairs):
            cells = []
            for metric in report.metrics:
                digits = DIGITS.get(metric, 4)
                found = difference(scores[network].values[metric], scores[reference].values[metric])
                text = f"{found.mean:+.{digits}f}"
                if math.isfinite(found.low):
                    star = " *" if found.low > 0 or found.high < 0 else ""
                    text += f" ± {found.high - found.mean:.{digits}f}{star}"
                cells.append(text)
            table.add_row(name if i == 0 else "", network, reference, *cells)
        table.add_section()
    return table


def to_csv(report: Report) -> str:
    """A line for each image, set and network, all digits."""
    metrics = dict.fromkeys(
        metric for scores in report.scores.values() for values in scores.values() for metric in values.values
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "weights", "image", *metrics])
    for name, scores in report.scores.items():
        for network, values in scores.items():
            for i, key in enumerate(values.keys):
                row = (repr(values.values[metric][i]) if metric in values.values else "" for metric in metrics)
                writer.writerow([name, network, key, *row])
    return text.getvalue()


def to_json(report: Report) -> str:
    """Everything: what was measured with what, means, values of each image, differences. Infinite and undefined
    numbers, which JSON lacks, are the strings "inf", "-inf" and "nan"."""
    results = {
        name: {
            network: {
                "mean": values.mean(),
                "failed": list(values.failed.values()),
                "images": [
                    {"key": key} | {metric: column[i] for metric, column in values.values.items()}
                    for i, key in enumerate(values.keys)
                ],
            }
            for network, values in scores.items()
        }
        for name, scores in report.scores.items()
    }
    differences = [
        {"set": name, "weights": network, "against": reference, "metric": metric, "confidence": CONFIDENCE}
        | vars(difference(scores[network].values[metric], scores[reference].values[metric]))
        for name, scores in report.scores.items()
        for network, reference in report.pairs
        for metric in report.metrics
    ]
    content = {**report.about, "results": results, "differences": differences}
    return json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n"


def jsonable(value: Any) -> Any:
    """The value with infinite and undefined numbers, which JSON lacks, as the strings "inf", "-inf" and "nan"."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def require_writable(path: Path, folder: bool = False) -> None:
    """UserError unless a file (or folder) can be written there: said before hours of work."""
    if path.exists() and path.is_dir() != folder:
        raise UserError(f"{path}: is {'no ' if folder else 'a '}folder; choose another output")
    if path.exists() and not folder and not path.is_file():
        raise UserError(f"{path}: is no ordinary file; choose another output")
    whole = path.resolve()
    existing = next(place for place in ([whole] if folder else []) + [*whole.parents] if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{path}: cannot be written there ({existing} takes no files)")


def write_whole(path: Path, content: bytes) -> None:
    """The file whole or not at all, where a link leads to. UserError if the disk does not take it."""
    with replacing(path) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
