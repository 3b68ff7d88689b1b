"""What a dataset holds, before a run spends a night on it: counts, sizes, mismatches, and a picture to look at.

`inspect_packed` reads Parquet as training does and compares it with its card, `inspect_units` what another source
gives, `inspect_pairs` images on disk. All decode everything and go on after what is bad, so that one look lists all
that is wrong. A subset of a published dataset is no fault, and what was left out (files.py) is counted.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mcir.data.card import checksums, file_sha256
from mcir.data.decode import decode, to_float
from mcir.data.encode import centre
from mcir.data.files import LeftOut, files_at
from mcir.data.pairs import Fault, Pairs
from mcir.data.parquet import CHECKSUMS, COLUMNS, Columns, open_parquet
from mcir.data.rows import Row, Units
from mcir.errors import UserError

Sample = tuple[str, tuple[str, ...], tuple[bytes | memoryview | None, ...]]
"""Key, where its images are, and they: clean, degraded or None, further ones."""


@dataclass
class Report:
    """What was found. `faults` are sentences, each naming its row or file."""

    num_samples: int = 0
    num_paired: int = 0
    num_bytes: int = 0
    num_files: int = 0
    clean_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(height, width) -> how many."""
    scales: Counter[int] = field(default_factory=Counter)
    """Clean side / degraded side -> how many pairs."""
    columns: tuple[str, ...] = ()
    """Further images of each sample."""
    fitting: Counter[str] = field(default_factory=Counter)
    """Column -> how many of its images have the clean one's size."""
    left_out: LeftOut = field(default_factory=LeftOut)
    note: str = ""
    faults: list[str] = field(default_factory=list)
    examples: list[tuple[str, Tensor]] = field(default_factory=list)
    """Labelled images for the contact sheet: degraded ("in") and clean alternate where there are pairs."""

    def print(self, console: Console | None = None) -> None:
        console = console or Console(markup=False)
        table = Table(show_header=False)
        table.add_row("samples", f"{self.num_samples:,} ({self.num_paired:,} pairs)")
        table.add_row("files", f"{self.num_files:,}")
        table.add_row("bytes of images", f"{self.num_bytes:,}")
        if self.clean_sizes:
            sides = sorted(self.clean_sizes)
            heights, widths = zip(*sides, strict=True)
            common, count = self.clean_sizes.most_common(1)[0]
            table.add_row("heights", f"{min(heights)} to {max(heights)}")
            table.add_row("widths", f"{min(widths)} to {max(widths)}")
            table.add_row("most common size", f"{common[0]} x {common[1]} ({count:,} of {self.num_samples:,})")
        if self.scales:
            table.add_row("scales", ", ".join(f"{scale} ({count:,} pairs)" for scale, count in self.scales.items()))
        for name in self.columns:
            table.add_row(f"column {name}", f"{self.fitting[name]:,} of the clean image's size")
        table.add_row("left out", f"{self.left_out.counts.total():,}")
        table.add_row("faults", f"{len(self.faults):,}")
        console.print(table)
        for line in [*filter(None, [self.note]), *(f"left out: {line}" for line in self.left_out.lines())]:
            console.print(line, soft_wrap=True)
        for fault in self.faults:
            console.print(f"- {fault}", soft_wrap=True)


def inspect_packed(
    place: Path | str,
    columns: Columns = COLUMNS,
    num_examples: int = 12,
) -> Report:
    """Look at the shards of a folder (or file, or pattern) as training reads them: every row decoded, keys unique,
    sizes fitting, checksums as in the card.

    Raises UserError where there are no shards.
    """
    report = Report()
    shards = files_at(str(place), ".parquet", report.left_out)
    if not shards:
        raise UserError(f"{place} holds no Parquet files; for images on disk give their layout")
    report.num_files = len(shards)
    folder = Path(place) if Path(place).is_dir() else shards[0].parent
    card = folder / "README.md"
    listed = checksums(card.read_text()) if card.exists() else {}
    for shard in shards:
        if shard.name in listed and listed[shard.name][2] != file_sha256(shard):
            report.faults.append(f"{shard}: its checksum is not the card's; it was changed or copied badly")
    if folder == Path(place):
        there = {shard.name for shard in shards}
        report.faults += [f"{folder / name}: listed in the card, but not there" for name in listed if name not in there]
    report.columns = further_columns(shards[0], columns)
    extra = dict.fromkeys(report.columns, str(shards[0]))
    units = open_parquet([str(shard) for shard in shards], str(place), columns, report.faults, extra)
    return inspect_units(units, report, num_examples)


def further_columns(shard: Path, columns: Columns) -> tuple[str, ...]:
    """Columns of images that `mcir data pack` wrote beyond those that pairs have."""
    known = dict(columns).values()
    try:
        metadata = pq.read_metadata(shard).metadata or {}
    except (OSError, pa.ArrowInvalid):  # what is wrong with the file is told where it is opened
        return ()
    declared = json.loads(metadata[b"huggingface"]) if CHECKSUMS in metadata else {}
    features = declared.get("info", {}).get("features", {})
    return tuple(name for name, kind in features.items() if kind == {"_type": "Image"} and name not in known)


def inspect_units(units: Units, report: Report | None = None, num_examples: int = 12) -> Report:
    """Look at all rows of an opened source."""
    report = report or Report(left_out=units.left_out)

    def samples() -> Iterator[Sample | str]:
        for unit in range(len(units.lengths)):
            said = ""
            for row in units.rows(unit, 0):
                if isinstance(row, Row):
                    names = ("clean", "degraded", *report.columns)
                    places = tuple(f"{row.where}, {name}" for name in names)
                    yield row.key, places, (row.clean, row.degraded, *row.extra.values())
                elif str(row) == said:  # a row group that cannot be read says so in each of its rows
                    report.num_samples += 1
                else:
                    yield (said := str(row))

    _look(samples(), sum(units.lengths), report, num_examples)
    return report


def inspect_pairs(pairs: Pairs, faults: Sequence[Fault] = (), num_examples: int = 12) -> Report:
    """Look at images on disk that were matched by name, with these `faults`: every file decoded, sizes fitting."""
    report = Report(left_out=pairs.left_out, faults=[line for fault in faults for line in fault.lines()])
    report.num_files = len({path for pair in pairs.samples for path in pair.files})
    report.columns = pairs.columns
    report.note = f"{pairs.title}: {pairs.note}" if pairs.note else ""

    def samples() -> Iterator[Sample | str]:
        for pair in pairs.samples:
            try:
                clean, *others = (path.read_bytes() for path in pair.files)
            except OSError as error:
                yield f"{error.filename} cannot be read: {error.strerror}"
                continue
            places = (str(pair.clean), str(pair.degraded), *map(str, pair.further))
            yield pair.key, places, (clean, *others) if pair.degraded else (clean, None, *others)

    scale = None if pairs.centre_crop else pairs.scale
    _look(samples(), len(pairs.samples), report, num_examples, scale, pairs.centre_crop)
    return report


def _look(
    samples: Iterable[Sample | str],
    total: int,
    report: Report,
    num_examples: int,
    scale: int | None = None,
    centre_crop: bool = False,
) -> None:
    wanted = set(np.random.default_rng(0).permutation(total)[:num_examples].tolist())
    alone: list[str] = []
    for number, sample in enumerate(track(samples, "looking", total, console=Console(stderr=True, markup=False))):
        report.num_samples += 1
        if isinstance(sample, str):
            report.faults.append(sample)
            continue
        key, places, files = sample
        report.num_bytes += sum(len(file or b"") for file in files)
        images, further = list[Tensor](), dict[str, Tensor]()
        for i, (place, file) in enumerate(zip(places, files, strict=True)):
            try:
                if file is not None and i < 2:
                    images.append(decode(file, place))
                elif file is not None:
                    further[place] = decode(file, place)
            except UserError as error:
                report.faults.append(str(error))
        if len(images) < 2 - (files[1] is None):
            continue
        clean = images[0]
        shown = centre(clean, *images[1].shape[-2:]) if centre_crop and len(images) == 2 else clean
        for name, place in zip(report.columns, places[2:], strict=True):
            if place in further and further[place].shape[-2:] == shown.shape[-2:]:
                report.fitting[name] += 1
            elif place in further:
                sides = (f"{image.shape[-2]} x {image.shape[-1]}" for image in (further[place], shown))
                report.faults.append(f"{place}: it is {', and clean '.join(sides)}")
        report.clean_sizes[(clean.shape[-2], clean.shape[-1])] += 1
        if len(images) == 1:
            alone.append(places[1])
        else:
            report.num_paired += 1
            found = _scale_of(clean, images[1], centre_crop)
            if found is None or (scale is not None and found != scale):
                sides = (f"{image.shape[-2]} x {image.shape[-1]}" for image in images)
                wanted_scale = f" at scale {scale}" if scale else ""
                report.faults.append(f"{places[1]}: sizes do not fit{wanted_scale}: clean {', degraded '.join(sides)}")
            else:
                report.scales[found] += 1
        if number in wanted:
            report.examples += [(f"{key} in", images[1]), (key, clean)] if len(images) == 2 else [(key, clean)]
    if report.num_paired:
        report.faults += [f"{place}: the image is missing, while other rows have one" for place in alone]
    if len(report.scales) > 1:
        report.faults.append(f"the pairs have several scales: {', '.join(map(str, sorted(report.scales)))}")


def _scale_of(clean: Tensor, degraded: Tensor, centre_crop: bool) -> int | None:
    if centre_crop:
        return 1 if all(c >= d for c, d in zip(clean.shape, degraded.shape, strict=True)) else None
    scale = round(clean.shape[-2] / degraded.shape[-2])
    fits = scale >= 1 and [side // scale for side in clean.shape[-2:]] == list(degraded.shape[-2:])
    return scale if fits else None


def contact_sheet(images: Sequence[tuple[str, Tensor]], columns: int = 6, side: int = 192) -> Image.Image:
    """Labelled tiles in reading order, each image enlarged or reduced to fit (small ones by whole pixels)."""
    label = 16
    num_rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, num_rows * (side + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, image) in enumerate(images):
        x, y = number % columns * side, number // columns * (side + label)
        height, width = image.shape[-2:]
        enlarge = max(1, side // max(height, width))
        tile = to_float(image).float()
        if enlarge > 1:
            tile = tile.repeat_interleave(enlarge, -2).repeat_interleave(enlarge, -1)
        elif max(height, width) > side:
            ratio = side / max(height, width)
            size = [max(1, int(height * ratio)), max(1, int(width * ratio))]
            tile = F.interpolate(tile[None], size=size, mode="bicubic", antialias=True)[0]
        pixels = (tile.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).contiguous()
        sheet.paste(Image.fromarray(pixels.numpy()), (x, y + label))
        draw.text((x + 2, y + 2), text[: side // 6], fill="black")
    return sheet
