"""How fast training data arrives, against the decoder alone and against a plain folder of pictures read with Pillow.

    python -m tests.benchmarks.bench_data [--photographs FOLDER] [--seconds 2] [--rounds 3] [--workers 0 1 2]

Pairs of 480 pixels (the pieces that DIV2K is trained in) are packed as `mcir data pack` does, as PNG, JPEG, WebP, WebP
without loss and uncompressed PNG ("raw"); every way delivers crops of 192 pixels in batches. The ways take turns, and
of each the fastest of `rounds` counts, so the ratios hold on a busy machine too. Images/s count decoded images, two a
sample. The decoder decodes whole images; mcir may be faster than that, since it stops below the crop where the format
allows (not in WebP without loss). Target: at least 0.9 of the decoder's own rate at equal cores and at least 1.3 times
the folder loop.

The second table is about the order, for datasets of 16 to 1536 row groups of 12 to 20 rows and batches of 16:
- shuffle: how far apart, in samples, rows land that were packed side by side, as a share of the epoch (1/3 where the
  order is uniformly random). `mcir data pack` shuffles the rows too; this is what the order adds.
- held: MiB of row groups that one process alone holds at most, of 16 MiB each (`mcir data pack`'s).
The third counts what is read: rows of the row groups that all reader processes together fetch in an epoch, over the
rows that they use, by ranks x workers. Row groups are fetched whole; did every process read everything, it would be the
number of processes. Of more than 8 ranks, 4 are counted.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from imagecodecs import png_decode, webp_decode
from PIL import Image
from simplejpeg import decode_jpeg
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms.functional import crop, hflip, to_tensor

from mcir.data.loader import Loader
from mcir.data.options import Options
from mcir.data.order import Order, share
from mcir.data.pack import ROW_GROUP_BYTES, pack
from mcir.data.pairs import pair_folders
from mcir.data.rows import Row, Units
from mcir.data.stream import DataConfig, Desk, Reader, SourceStream

SIDE, CROP, BATCH = 480, 192, 16
BUFFER = 1024
READERS = ((1, 0), (1, 4), (2, 4), (4, 4), (8, 4), (8, 8), (64, 8), (512, 8))  # ranks, workers
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "png": ("PNG", {}),
    "jpeg": ("JPEG", {"quality": 95}),
    "webp": ("WEBP", {"quality": 95}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "raw": ("PNG", {"compress_level": 0}),
}
DECODERS: dict[str, Callable[[bytes], object]] = {  # those of mcir.data.decode
    "png": png_decode,
    "jpeg": decode_jpeg,
    "webp": webp_decode,
    "lossless webp": webp_decode,
    "raw": png_decode,
}


def pictures(folder: Path | None) -> Iterator[Image.Image]:
    """Squares of SIDE from photographs, mirrored where they are too small, again and again; without a folder smooth
    noise, which compresses alike."""
    rng = np.random.default_rng(0)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".png")) if folder else []
    while True:
        for file in files:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))[:SIDE, :SIDE]
            missing = [(0, SIDE - side) for side in pixels.shape[:2]]
            yield Image.fromarray(np.pad(pixels, [*missing, (0, 0)], mode="reflect"))
        if not files:
            coarse = Image.fromarray(rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
            yield Image.fromarray((pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


def write(root: Path, kind: str, source: Iterator[Image.Image]) -> None:
    """The same pairs as two folders and as shards, with enough row groups for each of two workers to have its own."""
    suffix, options = KINDS[kind]
    folders = [root / kind / name for name in ("clean", "degraded")]
    for folder in folders:
        folder.mkdir(parents=True)
    num_bytes = 0
    for i in itertools.count():
        for folder in folders:
            file = folder / f"{i:05}.{suffix.lower()}"
            next(source).save(file, suffix, **options)
            num_bytes += file.stat().st_size
        if num_bytes > 9 * ROW_GROUP_BYTES:
            break
    pack(pair_folders(*folders), root / kind / "shards", Options())


class Folders(Dataset):
    """The plain loop: open with Pillow, to a tensor, crop, flip."""

    def __init__(self, root: Path) -> None:
        self.pairs = list(zip(sorted((root / "clean").iterdir()), sorted((root / "degraded").iterdir()), strict=True))
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return 1000 * len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = (int(place) for place in self.rng.integers(SIDE - CROP + 1, size=2))
        mirrored = bool(self.rng.integers(2))
        images = []
        for path in self.pairs[index % len(self.pairs)]:
            image = crop(to_tensor(Image.open(path).convert("RGB")), top, left, CROP, CROP)
            images.append(hflip(image) if mirrored else image)
        return images[0], images[1]


class Decoder(IterableDataset):
    """Images decoded from memory and thrown away; a worker sends a number now and then."""

    def __init__(self, root: Path, kind: str) -> None:
        files = [path for name in ("clean", "degraded") for path in sorted((root / name).iterdir())]
        self.images = [path.read_bytes() for path in files]
        self.kind = kind

    def __iter__(self) -> Iterator[int]:
        decode, share = DECODERS[self.kind], 2 * BATCH
        images = itertools.cycle(self.images)
        while True:
            for image in itertools.islice(images, share):
                decode(image)
            yield share


def rate(batches: Iterator[object], images_in_a_batch: int, seconds: float) -> float:
    """Images/s, the first batches (starting workers, first row groups) not counted."""
    for _ in range(4):
        next(batches)
    start, count = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < seconds:
        next(batches)
        count += images_in_a_batch
    return count / took


def ways(root: Path, kind: str, num_workers: int) -> dict[str, Callable[[], Iterator[object]]]:
    source = {"format": "parquet", "path": str(root / "shards")}
    config = DataConfig.model_validate({"train": [{"source": source}], "crop_size": CROP, "num_workers": num_workers})

    return {
        "mcir": lambda: iter(Loader(config, scale=1, batch_size=BATCH, seed=0)),
        "folder": lambda: iter(DataLoader(Folders(root), BATCH, num_workers=num_workers)),
        "decoder": lambda: iter(DataLoader(Decoder(root, kind), batch_size=None, num_workers=num_workers)),
    }


def speed(root: Path, args: argparse.Namespace) -> None:
    print(f"{'':13} workers {'mcir':>7} {'folder':>7} {'decoder':>7}  images/s   mcir/folder  mcir/decoder")
    source = pictures(args.photographs)
    for kind in args.kinds:
        write(root, kind, source)
        for num_workers in args.workers:
            best: dict[str, float] = {}
            for _ in range(args.rounds):
                for name, start in ways(root / kind, kind, num_workers).items():
                    batches = start()
                    best[name] = max(best.get(name, 0), rate(batches, 2 * BATCH, args.seconds))
                    del batches  # ends its workers
            mcir, folder, decoder = best["mcir"], best["folder"], best["decoder"]
            print(
                f"{kind:13} {num_workers:7} {mcir:7.0f} {folder:7.0f} {decoder:7.0f}"
                f"{mcir / folder:22.2f} {mcir / decoder:13.2f}",
                flush=True,
            )


def row_groups(num: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(0).integers(12, 21, num).tolist())  # a row group ends by bytes


def fetched(lengths: tuple[int, ...], ranks: int, workers: int, batch: int) -> float:
    """Rows of the row groups that all readers fetch in one epoch, as a multiple of the rows they use."""
    num_fetched = num_used = 0

    def rows(unit: int, start: int) -> Iterator[Row]:
        nonlocal num_fetched
        num_fetched += lengths[unit]
        yield from itertools.repeat(Row("", b"", None, ""), lengths[unit] - start)

    order = Order(lengths, 0, BUFFER, batch)
    for rank in range(0, ranks, ranks // 4 if ranks > 8 else 1):
        for worker in range(max(1, workers)):
            reader = Reader(rank, ranks, worker, max(1, workers))
            stream = SourceStream(Units(lengths, rows), order, Desk(reader.num_workers), reader)
            for start in range(0, order.num_rows - batch + 1, batch):
                for index in share(start, rank, ranks, batch):
                    num_used += stream.find(index)[1].worker == worker
    return num_fetched / num_used


def held(lengths: tuple[int, ...], batch: int) -> int:
    """MiB of row groups open at one time, for one process."""
    stream = SourceStream(
        Units(lengths, lambda *_: iter(())), Order(lengths, 0, BUFFER, batch), Desk(1), Reader(worker=None)
    )
    most = 0
    for index in range(min(sum(lengths), 20_000)):
        stream.find(index)
        most = max(most, len(stream.open))
    return most * ROW_GROUP_BYTES // 2**20


def shuffle() -> None:
    print("\nrow groups    rows  shuffle  held (batch of 16)  held (batch of 64)")
    for num_units in (16, 48, 192, 384, 1536):
        lengths = row_groups(num_units)
        order = Order(lengths, seed=0, buffer=BUFFER)
        starts, places = np.cumsum((0, *lengths)), np.empty(order.num_rows)
        for index in range(order.num_rows):
            unit, row = order.row(index)
            places[starts[unit] + row] = index
        distance = np.abs(np.diff(places)).mean() / order.num_rows
        print(
            f"{num_units:10} {order.num_rows:7} {distance:8.2f} {held(lengths, 16):15} MiB {held(lengths, 64):15} MiB"
        )


def amplification() -> None:
    print(f"\nrow groups  read by {'  '.join(f'{r} x {w}'.rjust(7) for r, w in READERS)}  ranks x workers")
    for num_units in (16, 48, 192, 768, 3072, 100_000):
        lengths, read = row_groups(num_units), []
        for ranks, workers in READERS:
            few, many = num_units < ranks, sum(lengths) * min(1, 4 / ranks) * workers > 2_000_000
            read.append("" if few or many else f"{fetched(lengths, ranks, workers, max(16, ranks)):.2f}")
        print(f"{num_units:10} {'':7} {'  '.join(text.rjust(7) for text in read)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="folder of photographs; without one, synthetic pictures")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="none: only the order")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        speed(Path(folder), args)
    shuffle()
    amplification()


if __name__ == "__main__":
    main()
