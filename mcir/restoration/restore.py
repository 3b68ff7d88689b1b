"""Restores files, folders and patterns of pictures into a folder: the logic of `mcir restore`.

Invariants: what can be known to be wrong is said before the first picture (no input, two inputs with one output, an
output that would replace an input, an impossible tile); a bad file stops nothing and is reported at the end; every
output is whole, so that what exists can be skipped by the next run.
"""

import errno
import glob
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor, nn

from mcir.archs.base import Descriptor
from mcir.data.files import LeftOut, files_below, why_left_out
from mcir.errors import UserError
from mcir.restoration.images import SUFFIXES, Picture, open_header, read, to_rgb, with_rgb, write
from mcir.restoration.inference import check_tiles, infer, is_out_of_memory

NUM_THREADS = 4  # that read ahead and write behind; the decoders release the interpreter lock

T = TypeVar("T")
Job = tuple[Path, Path]
"""Input file, output file."""


def restore(
    inputs: list[str],
    net: nn.Module,
    descriptor: Descriptor,
    output_dir: str | Path,
    *,
    device: torch.device,
    overwrite: bool = False,
    tile: int | Literal["auto"] | None = "auto",
    overlap: int | None = None,
    ensemble: bool = False,
    console: Console | None = None,
) -> list[str]:
    """Restores every picture of `inputs` to the same name in `output_dir`; returns one sentence for each that failed.

    `inputs`: files, folders (searched to any depth, the tree is kept in `output_dir`) and patterns (also `**`) of PNG,
    JPEG, WebP and TIFF; what else is there is counted in a line at the end. What exists in `output_dir` is skipped
    unless `overwrite`. `tile`, `overlap`, `ensemble`: see `infer`. `net` is moved to `device`. Progress goes to
    `console`.

    Raises UserError before anything is restored: an input that is missing or holds no picture, two inputs with one
    output, an output that is an input or a folder, an impossible tile; and later only for a full or write-protected
    disk.
    """
    check_tiles(descriptor, tile, overlap)
    output_dir, console = Path(output_dir), console or Console(stderr=True)
    left_out = LeftOut()
    jobs = plan(inputs, output_dir, left_out)
    todo = [job for job in jobs if overwrite or not os.path.exists(job[1])]
    if skipped := len(jobs) - len(todo):
        console.print(Text(f"{skipped} of {len(jobs)} exist in {output_dir}: skipped (--overwrite redoes them)"))
    run = partial(infer, net.to(device).eval(), descriptor, tile=tile, overlap=overlap, ensemble=ensemble)

    failures: list[str] = []
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with warnings.catch_warnings(), ThreadPoolExecutor(NUM_THREADS) as pool, Progress(*columns, console=console) as bar:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such files are refused in a sentence
        task, start = bar.add_task("", total=len(todo), rate=""), time.perf_counter()

        def done(failure: str | None = None) -> None:
            if failure:
                failures.append(failure)
            bar.advance(task)
            bar.update(task, rate=f"{bar.tasks[0].completed / (time.perf_counter() - start):.3g} images/s")

        writing: list[tuple[Job, Future[None]]] = []
        for batch in read_ahead(todo, pool, pixels_at_once(device), done):
            restored = restore_batch([picture for _, picture in batch], run, device)
            finish(writing, done)  # of the batch before, so that no more than two wait in memory
            writing = []
            for (job, _), result in zip(batch, restored, strict=True):
                if isinstance(result, str):
                    done(f"{job[0]}: {result}")
                else:
                    writing.append((job, pool.submit(write, job[1], result)))
        finish(writing, done)
    if left_out.counts:
        console.print(Text(f"left out: {'; '.join(left_out.lines())}"))
    return sorted(failures)


def plan(inputs: list[str], output_dir: Path, left_out: LeftOut | None = None) -> list[Job]:
    """Each input with its output. UserError: nothing there, two inputs of one output, an output that is an input or a
    folder."""
    sources: dict[Path, Path] = {}  # output -> input
    for pattern in inputs:
        found = list(find(pattern, output_dir, left_out))
        if not found:
            raise UserError(f"{pattern}: no picture found ({', '.join(SUFFIXES)})")
        for source, name in found:
            other = sources.setdefault(output_dir / name, source)
            if not other.samefile(source):
                raise UserError(f"{other} and {source} would both become {output_dir / name}: restore them separately")
    taken = {source.resolve() for source in sources.values()}
    for target, source in sources.items():
        if target.resolve() in taken:
            raise UserError(f"{source} would replace the input {target}: choose another output folder")
        if os.path.isdir(target):
            raise UserError(f"{target}: is a folder where {source} would be written: choose another output folder")
    return [(source, target) for target, source in sources.items()]


def find(pattern: str, output_dir: Path, left_out: LeftOut | None = None) -> Iterator[tuple[Path, Path]]:
    """(file, its name below the output folder) for a file, a folder or a pattern; of the last two what is no picture or
    hidden, which `left_out` counts, and earlier outputs take no part."""
    path, left_out = Path(pattern), LeftOut() if left_out is None else left_out
    if os.path.isfile(path):
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: not one of {', '.join(SUFFIXES)}")
        yield path, Path(path.name)
        return
    if os.path.isdir(path):
        root, found = path, files_below(path, SUFFIXES, left_out)
    elif glob.has_magic(pattern):
        fixed = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        root, found = Path(*path.parts[:fixed]), [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    else:
        raise UserError(f"{pattern}: no such file or folder")
    inside_output = output_dir.resolve() if output_dir.resolve() != root.resolve() else None
    for file in found:
        if file.is_dir() or (inside_output and inside_output in file.resolve().parents):
            continue
        reason = why_left_out(file.relative_to(root), SUFFIXES) or (not file.is_file() and "behind a broken link")
        if reason:
            left_out.add(reason, os.fsencode(file).decode(errors="backslashreplace"))
        else:
            yield file, file.relative_to(root)


def read_ahead(
    jobs: list[Job], pool: ThreadPoolExecutor, batch_pixels: int, done: Callable[[str | None], None]
) -> Iterator[list[tuple[Job, Picture]]]:
    """Batches of one size with at most `batch_pixels` (or one picture), the next one being read meanwhile."""
    by_size: dict[tuple[int, int], list[Job]] = defaultdict(list)
    for job, size in zip(jobs, pool.map(lambda job: attempt(header_size, job[0]), jobs), strict=True):
        if isinstance(size, str):
            done(size)
        else:
            by_size[size].append(job)
    batches = []
    for (width, height), same in by_size.items():
        num = max(1, batch_pixels // (width * height))
        batches += [same[first : first + num] for first in range(0, len(same), num)]
    reading: list[list[Future[Picture | str]]] = []
    for index, batch in enumerate(batches):
        for ahead in batches[index + len(reading) : index + 2]:
            reading.append([pool.submit(attempt, read, source) for source, _ in ahead])
        turned: dict[tuple[int, ...], list[tuple[Job, Picture]]] = defaultdict(list)  # EXIF may turn some of them
        for job, future in zip(batch, reading.pop(0), strict=True):
            picture = future.result()
            if isinstance(picture, str):
                done(picture)
            else:
                turned[picture.pixels.shape[:2]].append((job, picture))
        yield from turned.values()


def pixels_at_once(device: torch.device) -> int:
    """Input pixels of a batch: 8 pictures of 512 x 512 keep a GPU busy; a CPU gains nothing from more than one."""
    return 1 if device.type == "cpu" else 2**21


def header_size(path: Path) -> tuple[int, int]:
    """(width, height) as stored."""
    with open_header(path) as image:
        return image.size


def attempt(function: Callable[[Path], T], path: Path) -> T | str:
    """The function's result, or what the user should know."""
    try:
        return function(path)
    except UserError as error:
        return str(error)


def restore_batch(
    pictures: list[Picture], run: Callable[[Tensor], Tensor], device: torch.device
) -> list[Picture | str]:
    """Pictures of one size restored in one forward, in two halves if that does not fit; a sentence for a failure."""
    try:
        restored = run(torch.stack([to_rgb(picture) for picture in pictures]).to(device))
        return [
            with_rgb(picture, colours) if colours.isfinite().all() else "the network's output is not finite"
            for picture, colours in zip(pictures, restored, strict=True)
        ]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if len(pictures) == 1:
        height, width = pictures[0].pixels.shape[:2]
        return [
            f"{height} x {width} pixels do not fit into memory: give --tile auto, smaller tiles or a smaller --overlap"
        ]
    half = len(pictures) // 2
    return restore_batch(pictures[:half], run, device) + restore_batch(pictures[half:], run, device)


def finish(writing: list[tuple[Job, Future[None]]], done: Callable[[str | None], None]) -> None:
    """Waits until the outputs are written. UserError if the disk does not take them."""
    for (source, target), future in writing:
        try:
            future.result()
            done(None)
        except ValueError as error:
            done(f"{source}: cannot be written as {target.name}: {error}")
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                done(f"{source}: cannot be written: the path of its output, {target}, is too long")
                continue
            raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
