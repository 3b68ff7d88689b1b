"""Networks against datasets: the logic of `mcir evaluate`.

Invariants: what can be known to be wrong is said before the first image; every rank restores its share and writes its
own pictures, the main process alone prints and writes the rest; files appear whole; networks see the same degraded
images in the same order, so that they can be compared image by image.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mcir import __version__
from mcir.errors import UserError
from mcir.evaluation.divergence import save_divergence
from mcir.evaluation.evaluate import Picture, Restore, Scores, baseline, evaluate
from mcir.evaluation.perceptual import AnyMetric
from mcir.evaluation.pictures import one_below_another, side_by_side, to_image
from mcir.evaluation.plots import differences_png
from mcir.evaluation.report import (
    COMPARISON_NOTE,
    Report,
    comparison_table,
    png,
    require_writable,
    results_table,
    to_csv,
    to_json,
    write_whole,
)
from mcir.evaluation.sets import TestSet, metrics_of, open_sets
from mcir.restoration.images import Picture as ImageFile
from mcir.restoration.images import with_rgb, write
from mcir.restoration.inference import check_tiles, infer
from mcir.weights.trained import Trained

NUM_ROWS = 4
"""Images of a set that are shown side by side."""


@dataclass(frozen=True)
class Options:
    """How the networks are run. None is the set's config's tile, else none; see `infer`."""

    tile: int | Literal["auto"] | None = None
    overlap: int | None = None
    ensemble: bool = False


@dataclass(frozen=True)
class Outputs:
    """Where results go beside the screen."""

    json: Path | None = None
    csv: Path | None = None
    plot: Path | None = None
    """PNG of the differences."""
    images_dir: Path | None = None
    """Restored images SET/WEIGHTS/KEY.png, and SET.png: degraded, restored by each, clean, side by side."""
    divergence_dir: Path | None = None
    """SET/KEY.png for two networks: where they differ, beside where the image is degraded."""


def measure(
    networks: Sequence[Trained],
    places: Sequence[str],
    accelerator: Accelerator,
    *,
    protocol: str | None = None,
    baseline_name: str | None = None,
    published: bool = False,
    metrics: Sequence[AnyMetric] | None = None,
    options: Options = Options(),
    outputs: Outputs = Outputs(),
) -> Report:
    """Every network on every set (`open_sets` says what a place is), printed and written. Collective.

    `baseline_name`: `bicubic` (super-resolution) or `degraded` (the image as it came) as one more network; `published`:
    beside what was measured, the results of others that the sets' config holds; `metrics`: further ones,
    by default those that the configs among the places validate with.
    Raises UserError before the first image for whatever does not fit together.
    """
    console = Console(markup=False)
    scale = _common_scale(networks)
    if baseline_name is not None and baseline_name != ("bicubic" if scale > 1 else "degraded"):
        raise UserError(f"baseline {baseline_name}: for scale {scale} it is {'bicubic' if scale > 1 else 'degraded'}")
    if outputs.divergence_dir and len(networks) != 2:
        raise UserError("--divergence compares two networks, such as two checkpoints of a run: give two --weights")
    if outputs.plot and len(networks) + bool(baseline_name) < 2:
        raise UserError("--plot shows differences: give two --weights, or a --baseline")
    if any(network.name == baseline_name for network in networks):
        raise UserError(f"weights cannot be called {baseline_name}: give them another name, NAME=PATH")
    for path, folder in (
        *((path, False) for path in (outputs.json, outputs.csv, outputs.plot) if path),
        *((path, True) for path in (outputs.images_dir, outputs.divergence_dir) if path),
    ):
        require_writable(path, folder)
    for file, suffix in ((outputs.json, ".json"), (outputs.csv, ".csv"), (outputs.plot, ".png")):
        if file and file.exists() and file.suffix.lower() != suffix:
            raise UserError(f"{file}: is there already and no {suffix} file, such as would be replaced: name another")
    files = [path.resolve() for path in (outputs.json, outputs.csv, outputs.plot) if path]
    files += [path.resolve() for path in (outputs.images_dir, outputs.divergence_dir) if path]
    if len(set(files)) < len(files):
        raise UserError(f"two outputs are the same, {next(f for f in files if files.count(f) > 1)}: name two")
    sets = open_sets(places, scale, protocol)
    known = {name: test.data.published for name, test in sets.items() if published and test.data.published}
    if published and not known:
        raise UserError("--published: no set holds published results; give the recipe as --data configs/…/….yaml")
    metrics = metrics_of(places) if metrics is None else metrics
    for metric in metrics:
        metric.build(accelerator.device)
    for network in networks:
        for test in sets.values():
            tile, descriptor = _tile(test, options), network.arch.descriptor
            check_tiles(descriptor, tile, options.overlap)
            if options.overlap is not None and tile is None and not descriptor.fixed_size:
                raise UserError("--overlap is of tiles, and whole images are restored: give --tile, a number or auto")
    if accelerator.is_main_process:
        for network in networks:
            console.print(f"{network.name}: {network.origin}", highlight=False, soft_wrap=True)
        for name, test in sets.items():
            console.print(f"{name}: {test}", highlight=False, soft_wrap=True)

    restorers: dict[str, Trained | None] = {baseline_name: None} if baseline_name else {}
    restorers |= {network.name: network for network in networks}
    scores: dict[str, dict[str, Scores]] = {name: {} for name in sets}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not accelerator.is_main_process or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        for name, test in sets.items():
            shown: dict[str, list[Picture]] = {}
            for label, restorer in restorers.items():
                restore = _restore(restorer, test, options, scale, accelerator)
                other = networks[0] if outputs.divergence_dir and restorer is networks[1] else None
                visit = _Visit(
                    bar,
                    bar.add_task(f"{name} {label}", total=-(-test.num_images // accelerator.num_processes)),
                    outputs.images_dir / name / label if outputs.images_dir else None,
                    outputs.divergence_dir / name if other and outputs.divergence_dir else None,
                    _restore(other, test, options, scale, accelerator) if other else None,
                    accelerator.device,
                )
                num_rows = NUM_ROWS if outputs.images_dir else 0
                scores[name][label], pictures = evaluate(
                    restore, test.data, scale, accelerator, num_rows, visit, metrics
                )
                shown[label] = pictures
            failed = {place: why for found in scores[name].values() for place, why in found.failed.items()}
            scores[name] = {label: found.without(failed) for label, found in scores[name].items()}
            if not next(iter(scores[name].values())).keys:
                raise UserError(f"{name}: no image can be measured by all; the first: {next(iter(failed.values()))}")
            if outputs.images_dir and accelerator.is_main_process:
                write_whole(outputs.images_dir / f"{name}.png", rows_png(shown))
    about = _about(networks, sets, options, baseline_name, accelerator)
    about["metrics"] = [metric.model_dump(mode="json") for metric in metrics]
    lower = frozenset(metric.label for metric in metrics if metric.better == "lower")
    further = tuple(metric.label for metric in metrics)
    report = Report(scores, baseline_name is not None, about, known, lower, further)
    if accelerator.is_main_process:
        _publish(report, outputs, console)
    return report


def _common_scale(networks: Sequence[Trained]) -> int:
    scales = {network.arch.descriptor.scale: network.name for network in networks}
    if len(scales) > 1:
        listed = ", ".join(f"{name} x{scale}" for scale, name in scales.items())
        raise UserError(f"networks of different scales cannot be compared: {listed}")
    return next(iter(scales))


def _tile(test: TestSet, options: Options) -> int | Literal["auto"] | None:
    return test.tile if options.tile is None else options.tile


def _restore(network: Trained | None, test: TestSet, options: Options, scale: int, accelerator: Accelerator) -> Restore:
    if network is None:
        return baseline(scale)
    net, tile = network.net_on(accelerator.device), _tile(test, options)
    return partial(infer, net, network.arch.descriptor, tile=tile, overlap=options.overlap, ensemble=options.ensemble)


@dataclass(frozen=True)
class _Visit:
    """What is done with each restored image on its rank: progress, and pictures that nobody else could write."""

    bar: Progress
    task: Any
    images_dir: Path | None
    divergence_dir: Path | None
    other: Restore | None
    """The network that the divergence is taken from."""
    device: torch.device

    def __call__(self, picture: Picture) -> dict[str, float]:
        values = {}
        try:
            if self.images_dir:
                blank = torch.zeros(*picture.restored.shape[1:], 3, dtype=torch.uint8).numpy()
                write(inside(self.images_dir, picture.key), with_rgb(ImageFile(blank, "PNG"), picture.restored))
            if self.divergence_dir and self.other:
                first = self.other(picture.degraded[None].to(self.device))[0]
                path = inside(self.divergence_dir, picture.key)
                values["agreement"] = save_divergence(path, picture.degraded, picture.clean, first, picture.restored)
        except OSError as error:
            raise UserError(f"the pictures of {picture.key} cannot be written ({error})") from error
        self.bar.advance(self.task)
        return values


def inside(folder: Path, key: str) -> Path:
    """The PNG of a key in a folder. UserError for a key that leads out of it: keys come from the dataset."""
    path = folder / f"{key}.png"
    if folder.resolve() not in path.resolve().parents:
        raise UserError(f"the key {key!r} is no file name; pack the dataset with others to save pictures")
    return path


def rows_png(shown: Mapping[str, Sequence[Picture]]) -> bytes:
    """PNG of a row for each image: degraded | restored by each network in turn | clean, and where they differ most."""
    rows: list[Tensor] = []
    whole = set.intersection(*({picture.key for picture in pictures} for pictures in shown.values()))
    kept = [[picture for picture in pictures if picture.key in whole] for pictures in shown.values()]
    for same in zip(*kept, strict=True):
        restored = {label: picture.restored for label, picture in zip(shown, same, strict=True)}
        compared = [*restored.values()] if len(restored) > 1 else [same[0].restored, same[0].clean]
        rows.append(side_by_side({"degraded": same[0].degraded, **restored, "clean": same[0].clean}, compared))
    return png(to_image(one_below_another(rows)))


def _about(
    networks: Sequence[Trained],
    sets: Mapping[str, TestSet],
    options: Options,
    baseline_name: str | None,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What the numbers depend on."""
    cuda = accelerator.device.type == "cuda"
    libraries = ("torch", "torchvision", "accelerate", "datasets", "numpy", "pillow")
    return {
        "versions": {"mcir": __version__, "python": platform.python_version()} | {n: version(n) for n in libraries},
        "device": torch.cuda.get_device_name(accelerator.device) if cuda else accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "options": asdict(options),
        "baseline": baseline_name,
        "weights": {
            network.name: {
                "path": str(network.path),
                "origin": network.origin,
                "sha256": network.sha256,
                "step": int(network.metadata["step"]) if "step" in network.metadata else None,
                "arch": network.arch.model_dump(mode="json"),
                "config": network.config,
            }
            for network in networks
        },
        "sets": {
            name: test.data.model_dump(mode="json") | {"num_images": test.num_images, "tile": _tile(test, options)}
            for name, test in sets.items()
        },
    }


def _publish(report: Report, outputs: Outputs, console: Console) -> None:
    """The tables, and the files that were asked for."""
    console.print(results_table(report))
    if report.pairs:
        console.print(comparison_table(report))
        console.print(COMPARISON_NOTE, highlight=False, soft_wrap=True)
    for name, scores in report.scores.items():
        for values in scores.values():
            if outputs.divergence_dir and "agreement" in values.values:
                mean = values.mean()["agreement"]
                console.print(
                    f"{name}: where the two differ and where it was degraded correlate by {mean:.3f} "
                    f"(mean over images); maps in {outputs.divergence_dir / name}",
                    highlight=False,
                    soft_wrap=True,
                )
    if outputs.json:
        write_whole(outputs.json, to_json(report).encode())
    if outputs.csv:
        write_whole(outputs.csv, to_csv(report).encode())
    if outputs.plot:
        write_whole(outputs.plot, differences_png(report))
