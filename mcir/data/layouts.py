"""How each published dataset names its pairs on disk: folders in, (key, clean file, degraded file) out.

A layout is data, not code: where both halves lie and how a degraded file's name leads to its clean one (pairs.py).
Folders are those the published training codes read (FFA-Net, DehazeFormer, IDT, NAFNet, SwinIR, BasicSR, Restormer,
MPRNet, PromptIR, Retinexformer, HI-Diff) or the archives themselves unpack to.
"""

from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from mcir.data.files import LeftOut, is_left_over
from mcir.data.pairs import (
    Fault,
    Names,
    Pair,
    Pairs,
    Split,
    images_below,
    match,
    repeated_keys,
    settle,
)
from mcir.errors import UserError


@dataclass(frozen=True)
class Folders:
    """One pair of folders, relative to the root. `{split}`, `{Split}` (with a capital) and `{scale}` are filled in; one
    `*` stands for a folder name that both sides share (a scene) and that goes in front of the key."""

    clean: str
    degraded: str = ""
    """Empty: clean images alone."""
    name: str = r"(.+)"
    """Pattern of a degraded file's path inside its folder, without suffix; group 1 is the key."""
    clean_name: str = r"\1"
    """The clean file's path inside its folder, without suffix, from the groups of `name`."""
    clean_names: str = ""
    """Where both halves share a folder: which of its names are clean."""
    split: str = ""
    """Of which split this is; empty: of any."""


@dataclass(frozen=True)
class Layout:
    title: str
    alternatives: tuple[tuple[Folders, ...], ...]
    """Ways in which the dataset is commonly unpacked: the first whose clean folders exist is taken, all its parts."""
    splits: tuple[str, ...] = ()
    """What `split` may be; none: the root is the split."""
    scales: tuple[int, ...] = ()
    """What `scale` may be for super-resolution sets; without one, only the clean half is read."""
    centre_crop: bool = False
    published: tuple[int, ...] = ()
    """Published numbers of pairs, in the order of `splits`; without splits any of them will do, and where there are
    several the last is that of the test images."""
    test: bool = False
    """Nobody trains on it."""


def _benchmark(title: str, count: int) -> Layout:
    return Layout(
        title,
        (
            (Folders("HR", "LR_bicubic/X{scale}", r"(.+)x{scale}"),),
            (Folders("GTmod12", "LRbicx{scale}"),),
        ),
        scales=(2, 3, 4),
        published=(count,),
        test=True,
    )


def _same_names(title: str, clean: str, degraded: str, *published: int) -> Layout:
    return Layout(title, ((Folders(clean, degraded),),), published=published)


def _test_set(title: str, *published: int) -> Layout:
    """As Restormer and its followers keep them: below the folder of all test sets, or by themselves."""
    roots = "", f"{title}/", f"test/{title}/", f"Datasets/test/{title}/"
    alternatives = tuple((Folders(f"{root}target", f"{root}input"),) for root in roots)
    return Layout(title, alternatives, published=published, test=True)


def _hazy(title: str, centre_crop: bool, *published: int, test: bool = False) -> Layout:
    """`clear/1.png` has many hazy versions `hazy/1_*.png`: its name is what stands before the first underscore."""
    many = {"name": r"((?:.+/)?([^_/]+)_[^/]+)", "clean_name": r"\2"}
    places = ("clear", "hazy"), ("gt", "hazy"), ("GT", "hazy"), ("original", "synthetic"), ("target", "input")
    alternatives = tuple((Folders(*halves, **many),) for halves in places)
    return Layout(title, alternatives, centre_crop=centre_crop, published=published, test=test)


def _rain(title: str, *published: int) -> Layout:
    return Layout(title, ((Folders("groundtruth", "input", r"(rain-(.+))", r"norain-\2"),),), published=published)


def _low_light(title: str, folder: str, low: str, *published: int) -> Layout:
    """LOL-v2: `Real_captured/Train/Low/low00001.png` and `Normal/normal00001.png`; later packings use one name."""
    splits = {split: f"{folder}/{split.title()}" for split in ("train", "test")}
    alternatives = tuple(
        (Folders(f"{place}/Normal", f"{place}/Low", *names, split=split),)
        for split, place in splits.items()
        for names in ((rf"({low}(.+))", r"normal\2"), (r"(.+)", r"\1"))
        if low or names[1] == r"\1"
    )
    return Layout(title, alternatives, splits=("train", "test"), published=published)


def _dehazeformer(title: str, *published: int) -> Layout:
    folders = (Folders("{split}/GT", "{split}/hazy"),)
    return Layout(title, (folders,), splits=("train", "test"), published=published)


_DIV2K = Folders("DIV2K_{split}_HR", "DIV2K_{split}_LR_bicubic/X{scale}", r"(.+)x{scale}")
_FLICKR2K = Folders("Flickr2K/Flickr2K_HR", "Flickr2K/Flickr2K_LR_bicubic/X{scale}", r"(.+)x{scale}")
_FLICKR2K_BESIDE = Folders("Flickr2K_HR", "Flickr2K_LR_bicubic/X{scale}", r"(.+)x{scale}")
_DIV2K_INSIDE = Folders("DIV2K/DIV2K_{split}_HR", "DIV2K/DIV2K_{split}_LR_bicubic/X{scale}", r"(.+)x{scale}")
_IDT = ("groundtruth", "input")


def _sidd(root: str) -> Folders:
    """A folder a scene with both halves, `NOISY_SRGB_010.PNG` and `GT_SRGB_010.PNG`, some with a number in front."""
    return Folders(root, root, r"((.+/[^/]*)NOISY_(.+))", r"\2GT_\3", clean_names=r".*GT_[^/]*", split="train")


LAYOUTS = {
    "div2k": Layout("DIV2K", ((_DIV2K,),), splits=("train", "valid"), scales=(2, 3, 4), published=(800, 100)),
    "df2k": Layout(
        "DF2K (DIV2K and Flickr2K)",
        ((_DIV2K, _FLICKR2K), (_DIV2K, _FLICKR2K_BESIDE), (_DIV2K_INSIDE, _FLICKR2K)),
        splits=("train",),
        scales=(2, 3, 4),
        published=(3450,),
    ),
    "set5": _benchmark("Set5", 5),
    "set14": _benchmark("Set14", 14),
    "b100": _benchmark("B100 (BSD100)", 100),
    "urban100": _benchmark("Urban100", 100),
    "manga109": _benchmark("Manga109", 109),
    "reside-its": _hazy("RESIDE ITS", True, 13_990),
    "reside-ots": _hazy("RESIDE OTS", False, 72_135),
    "sots-indoor": _hazy("SOTS indoor", True, 500, test=True),
    "sots-outdoor": _hazy("SOTS outdoor", False, 500, test=True),
    "reside-in": _dehazeformer("RESIDE-IN (DehazeFormer's packing)"),
    "reside-out": _dehazeformer("RESIDE-OUT (DehazeFormer's packing)"),
    "reside-6k": _dehazeformer("RESIDE-6K (SOTS-mix)", 6000, 1000),
    "rain100l": _same_names("Rain100L", "target", "input", 200, 100),
    "rain100h": _same_names("Rain100H", "target", "input", 1800, 100),
    "rain200l": _rain("Rain200L", 1800, 200),
    "rain200h": _rain("Rain200H", 1800, 200),
    "did": _same_names("DID-Data", *_IDT, 12_000, 1200),
    "ddn": Layout("DDN-Data", ((Folders(*_IDT, r"((.+)_\d+)", r"\2"),),), published=(12_600, 1400)),
    "spa": _same_names("SPA-Data", *_IDT, 638_492, 638_464, 1000),
    "gopro": Layout(
        "GoPro",
        (
            (Folders("{split}/*/sharp", "{split}/*/blur"),),
            (Folders("{split}/target", "{split}/input"),),
            (Folders("{split}/sharp_crops", "{split}/blur_crops"),),
        ),
        splits=("train", "test"),
        published=(2103, 1111),
    ),
    "rain13k": Layout(
        "Rain13K",
        tuple(
            (Folders(f"{root}target", f"{root}input"),)
            for root in ("train/Rain13K/", "Rain13K/train/", "train/", "Rain13K/", "")
        ),
        published=(13_712,),
    ),
    "test100": _test_set("Test100", 98, 100),
    "test1200": _test_set("Test1200", 1200),
    "test2800": _test_set("Test2800", 2800),
    "hide": _test_set("HIDE", 2025),
    "realblur-j": _test_set("RealBlur_J", 980),
    "realblur-r": _test_set("RealBlur_R", 980),
    "sidd": Layout(
        "SIDD",
        (
            *((_sidd(root),) for root in ("Data", "SIDD_Medium_Srgb/Data")),
            *(
                (Folders(f"{root}{clean}_crops", f"{root}input_crops"),)
                for root in ("{split}/", "{split}/SIDD/")
                for clean in ("gt", "target")
            ),
            (Folders("{split}/groundtruth", "{split}/input"),),
        ),
        splits=("train", "val"),
        published=(320, 1280),
    ),
    "lol": Layout(
        "LOL",
        (
            (Folders("our485/high", "our485/low", split="train"),),
            (Folders("eval15/high", "eval15/low", split="test"),),
            (Folders("{Split}/target", "{Split}/input"),),
            (Folders("{split}/high", "{split}/low"),),
        ),
        splits=("train", "test"),
        published=(485, 15),
    ),
    "lol-v2-real": _low_light("LOL-v2 real", "Real_captured", "low", 689, 100),
    "lol-v2-synthetic": _low_light("LOL-v2 synthetic", "Synthetic", "", 900, 100),
    "bsd400-wed": Layout(
        "BSD400 and WED",
        ((Folders("BSD400"), Folders("WED")), (Folders("BSD"), Folders("WED")), (Folders("Denoise"),)),
        published=(5144,),
    ),
    "dfwb": Layout(
        "DFWB (DIV2K, Flickr2K, WED and BSD)",
        (
            (Folders("DIV2K"), Folders("Flickr2K"), Folders("WaterlooED"), Folders("BSD400")),
            (Folders("DIV2K"), Folders("Flickr2K"), Folders("WED"), Folders("BSD500")),
            (Folders("DFWB_RGB/HQ"),),
            (Folders("DFWB"),),
        ),
        published=(8594,),
    ),
}
_SPLITS: dict[str | None, Split] = {"train": "train", "valid": "validation", "val": "validation", "test": "test"}


def find_pairs(
    layout: str,
    root: Path,
    split: str | None = None,
    scale: int | None = None,
    faults: list[Fault] | None = None,
) -> Pairs:
    """The samples of a published dataset unpacked at `root`.

    `split` is asked of layouts that hold several, `scale` of super-resolution sets (without it only their clean half is
    taken). Raises UserError: unknown layout, split or scale; no such folders; halves that do not fit, which go to
    `faults` instead where they are given.
    """
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    known = LAYOUTS[layout]
    if known.splits and split not in known.splits:
        raise UserError(
            f"layout {layout}: give the split, {' or '.join(known.splits)}" + (f", not {split}" * bool(split))
        )
    if split and not known.splits:
        raise UserError(f"layout {layout} has no splits: give the folder of the {split} half as the root")
    if scale and scale not in known.scales:
        scales = f"it has {', '.join(map(str, known.scales))}" if known.scales else "its pairs are of one size"
        raise UserError(f"layout {layout} has no scale {scale}: {scales}")
    places = {"split": split or "", "Split": (split or "").title(), "scale": str(scale or "")}
    alternatives = [
        [_fill(folders, places) for folders in parts]
        for parts in known.alternatives
        if all(folders.split in ("", split or "") for folders in parts)
    ]
    parts = next((parts for parts in alternatives if all(any(root.glob(f.clean)) for f in parts)), None)
    if parts is None:
        wanted = " or ".join(" and ".join(folders.clean for folders in parts) for parts in alternatives)
        raise UserError(f"{root} is not laid out as {layout}: there is no folder {wanted} in it")
    with_degraded = scale is not None or not known.scales
    found: list[Fault] = []
    left_out = LeftOut()
    samples = [pair for folders in parts for pair in _paired(root, folders, with_degraded, found, left_out)]
    settle(found + repeated_keys(samples), faults)
    published = known.published
    if split and len(published) == len(known.splits):
        published = (published[known.splits.index(split)],)
    expected = " or ".join(f"{count:,}" for count in published)
    note = "" if not published or len(samples) in published else f"published with {expected}, found {len(samples):,}"
    tested = known.test or (len(published) > 1 and len(samples) == published[-1] != published[0])
    named = "test" in (part.lower() for part in root.absolute().parts[-2:])
    role = _SPLITS.get(split, "test" if tested or named else "train")
    return Pairs(tuple(samples), scale or 1, known.centre_crop, known.title, note, left_out, role)


def recognise(root: Path, scale: int) -> dict[tuple[str, str | None], Pairs]:
    """The published datasets as which the whole of `root` reads at this scale, by layout and split; of several that
    find the same pairs there, one (the first of the published size)."""
    found: dict[tuple[Pair, ...], tuple[tuple[str, str | None], Pairs]] = {}
    for layout, known in LAYOUTS.items():
        if bool(known.scales) != (scale > 1):
            continue
        for split in known.splits or (None,):
            try:
                pairs = find_pairs(layout, root, split, scale if scale > 1 else None)
            except UserError:
                continue
            before = found.get(pairs.samples)
            if pairs.samples[0].degraded and (before is None or (before[1].note and not pairs.note)):
                found[pairs.samples] = (layout, split), pairs
    return dict(found.values())


def whose_degraded_half(folder: Path) -> tuple[str, Path] | None:
    """Title and clean folder of the published dataset of whose degraded half this is the folder: there is that clean
    folder too, or the folder is called as only small images are (LR_bicubic/X4)."""
    folder = folder.absolute()
    for known in LAYOUTS.values():
        for parts in known.alternatives:
            for folders in parts:
                places = [(split, scale) for split in known.splits or ("",) for scale in known.scales or ("",)]
                for split, scale in places if folders.degraded else ():
                    own = _fill(folders, {"split": split, "Split": split.title(), "scale": str(scale)})
                    depth = len(PurePath(own.degraded).parts)
                    if len(folder.parts) <= depth or own.clean == own.degraded or not folder.match(own.degraded):
                        continue
                    root = folder.parents[depth - 1]
                    clean = next(root.glob(own.clean), root / own.clean)
                    if clean != folder and (known.scales or clean.is_dir()):
                        return known.title, clean
    return None


def _fill(folders: Folders, places: dict[str, str]) -> Folders:
    clean, degraded = (folder.format(**places) for folder in (folders.clean, folders.degraded))
    return replace(folders, clean=clean, degraded=degraded, name=folders.name.replace("{scale}", places["scale"]))


def _paired(root: Path, folders: Folders, with_degraded: bool, faults: list[Fault], left_out: LeftOut) -> list[Pair]:
    samples = []
    before, star, after = folders.clean.partition("*")
    for clean in sorted(root.glob(folders.clean)):
        scene = clean.relative_to(root).as_posix()[len(before) :].removesuffix(after) if star else ""
        if is_left_over(PurePath(scene)):
            continue
        prefix = f"{scene}/" if scene else ""
        if not with_degraded or not folders.degraded:
            images = images_below(clean, faults, left_out)
            samples += [Pair(prefix + name, path, None) for name, path in images.items()]
            continue
        degraded = root / folders.degraded.replace("*", scene)
        if not degraded.is_dir():
            faults.append(Fault(f"{clean} is there, but its degraded half {degraded} is not a folder"))
            continue
        names = Names(folders.name, folders.clean_name, clean_names=folders.clean_names)
        samples += match(clean, degraded, names, prefix, faults, left_out)
    return samples
