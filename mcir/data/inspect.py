"""What a dataset holds, before a run spends a night on it: counts, sizes, mismatches, and a picture to look at.

`inspect_packed` reads a folder of shards and compares it with its card, `inspect_pairs` images on disk; both decode
everything and go on after a bad row, so that one look lists all that is wrong.
"""

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
from mcir.data.decode import decode
from mcir.data.degrade import Bicubic, GaussianBlur, Haze, Jpeg, MotionBlur, Noise, Rain
from mcir.data.files import files_below
from mcir.data.pairs import Pairs
from mcir.errors import UserError

Sample = tuple[str, tuple[str, str], bytes, bytes | None]  # key, where clean and degraded are, clean, degraded


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
    faults: list[str] = field(default_factory=list)
    examples: list[tuple[str, Tensor]] = field(default_factory=list)
    """Labelled images for the contact sheet: degraded ("in") and clean alternate where there are pairs."""

    def print(self, console: Console | None = None) -> None:
        console = console or Console()
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
        table.add_row("faults", f"{len(self.faults):,}")
        console.print(table)
        for fault in self.faults:
            console.print(f"- {fault}", markup=False, soft_wrap=True)


def inspect_packed(folder: Path, num_examples: int = 12, seed: int = 0) -> Report:
    """Look at the shards in `folder`: every row decoded, keys unique, sizes fitting, checksums as in the card.

    Raises UserError where there are no shards.
    """
    shards = files_below(folder, [".parquet"])
    if not shards:
        raise UserError(f"{folder} holds no Parquet files; for images on disk give their layout")
    report = Report(num_files=len(shards))
    card = folder / "README.md"
    listed = checksums(card.read_text()) if card.exists() else {}
    for shard in shards:
        if shard.name in listed and listed[shard.name][2] != file_sha256(shard):
            report.faults.append(f"{shard}: its checksum is not the card's; it was changed or copied badly")
    there = {shard.name for shard in shards}
    report.faults += [f"{folder / name}: listed in the card, but not there" for name in listed if name not in there]
    rows = {}
    for shard in shards:
        try:
            rows[shard] = pq.read_metadata(shard).num_rows
        except Exception as error:
            report.faults.append(f"{shard}: not a readable Parquet file: {error}")
    total = sum(rows.values())
    _look(_packed_samples(rows, report), total, report, num_examples, seed)
    return report


def inspect_pairs(pairs: Pairs, num_examples: int = 12, seed: int = 0) -> Report:
    """Look at images on disk (`layouts.find_pairs` has matched them by name): every file decoded, sizes fitting."""
    report = Report(num_files=len({path for pair in pairs.samples for path in (pair.clean, pair.degraded) if path}))
    if pairs.note:
        report.faults.append(f"{pairs.title}: {pairs.note}")

    def samples() -> Iterator[Sample]:
        for pair in pairs.samples:
            degraded = pair.degraded.read_bytes() if pair.degraded else None
            yield pair.key, (str(pair.clean), str(pair.degraded)), pair.clean.read_bytes(), degraded

    scale = None if pairs.centre_crop else pairs.scale
    _look(samples(), len(pairs.samples), report, num_examples, seed, scale, pairs.centre_crop)
    return report


def _packed_samples(shards: dict[Path, int], report: Report) -> Iterator[Sample]:
    seen: dict[str, str] = {}
    for shard in shards:
        number = -1
        try:
            for batch in pq.ParquetFile(shard, page_checksum_verification=True).iter_batches(batch_size=16):
                if missing := {"clean", "key"} - set(batch.schema.names):
                    report.faults.append(f"{shard}: no column {', '.join(sorted(missing))}")
                    break
                images = [name for name in ("clean", "degraded") if name in batch.schema.names]
                if plain := [name for name in images if not pa.types.is_struct(batch.schema.field(name).type)]:
                    report.faults.append(f"{shard}: {', '.join(plain)} must be structs of `bytes` and `path`")
                    break
                for row in batch.to_pylist():
                    number += 1
                    where = f"{shard}, row {number} (key {row['key']})"
                    if (before := seen.setdefault(row["key"], where)) != where:
                        report.faults.append(f"{where}: the key is that of {before} too")
                    degraded = (row["degraded"] or {}).get("bytes") or b"" if "degraded" in row else None
                    places = f"{where}, clean", f"{where}, degraded"
                    yield row["key"], places, (row["clean"] or {}).get("bytes") or b"", degraded
        except OSError as error:
            report.faults.append(f"{shard}, from row {number + 1} on: unreadable: {error}")


def _look(
    samples: Iterable[Sample],
    total: int,
    report: Report,
    num_examples: int,
    seed: int,
    scale: int | None = None,
    centre_crop: bool = False,
) -> None:
    wanted = set(np.random.default_rng(seed).permutation(total)[:num_examples].tolist())
    for number, (key, (at_clean, at_degraded), clean_bytes, degraded_bytes) in enumerate(
        track(samples, "looking", total, console=Console(stderr=True))
    ):
        report.num_samples += 1
        report.num_bytes += len(clean_bytes) + len(degraded_bytes or b"")
        try:
            clean = decode(clean_bytes, at_clean)
            degraded = decode(degraded_bytes, at_degraded) if degraded_bytes is not None else None
        except UserError as error:
            report.faults.append(str(error))
            continue
        report.clean_sizes[(clean.shape[-2], clean.shape[-1])] += 1
        if degraded is not None:
            report.num_paired += 1
            found = _scale_of(clean, degraded, centre_crop)
            if found is None or (scale is not None and found != scale):
                sides = (f"{image.shape[-2]} x {image.shape[-1]}" for image in (clean, degraded))
                wanted_scale = f" at scale {scale}" if scale else ""
                report.faults.append(
                    f"{at_degraded}: sizes do not fit{wanted_scale}: clean {', degraded '.join(sides)}"
                )
            else:
                report.scales[found] += 1
        if number in wanted:
            report.examples += [(key, clean)] if degraded is None else [(f"{key} in", degraded), (key, clean)]
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
        tile = image.float() / 255 if image.dtype == torch.uint8 else image.float()
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


def degradation_examples(clean: Tensor, seed: int = 0) -> list[tuple[str, Tensor]]:
    """One example of each degradation of `clean` (3, H, W), labelled, for a contact sheet."""
    kinds = [
        ("bicubic, scale 4", Bicubic(scale=4)),
        ("noise, sigma 25", Noise(sigma=25)),
        ("jpeg, quality 10", Jpeg(quality=10)),
        ("gaussian_blur, sigma 2", GaussianBlur(sigma=2)),
        ("motion_blur, 15 px", MotionBlur(length=15, angle=30)),
        ("haze, beta 1.5", Haze(beta=1.5, airlight=0.9)),
        ("rain", Rain(density=0.006, length=20, angle=75, strength=0.4)),
    ]
    height, width = (side // 4 * 4 for side in clean.shape[-2:])
    clean = clean[:, :height, :width]
    return [("clean", clean), *((name, kind(clean, np.random.default_rng(seed))) for name, kind in kinds)]
