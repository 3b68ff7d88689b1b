"""How each published dataset names its pairs on disk: folders in, (key, clean file, degraded file) out.

A layout is data, not code: where both halves lie and how a degraded file's name leads to its clean one (pairs.py).
Folders are those the published training codes read (FFA-Net, DehazeFormer, IDT, NAFNet, SwinIR, BasicSR).
"""

from dataclasses import dataclass
from pathlib import Path, PurePath

from mcir.data.files import LeftOut, is_left_over
from mcir.data.pairs import Fault, Names, Pair, Pairs, images_below, match, repeated_keys, settle
from mcir.errors import UserError


@dataclass(frozen=True)
class Folders:
    """One pair of folders, relative to the root. `{split}` and `{scale}` are filled in; one `*` stands for a folder
    name that both sides share (a scene) and that goes in front of the key."""

    clean: str
    degraded: str
    name: str = r"(.+)"
    """Pattern of a degraded file's path inside its folder, without suffix; group 1 is the key."""
    clean_name: str = r"\1"
    """The clean file's path inside its folder, without suffix, from the groups of `name`."""


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
    """Published numbers of pairs, in the order of `splits`; without splits any of them will do."""


def _benchmark(title: str, count: int) -> Layout:
    return Layout(
        title,
        (
            (Folders("HR", "LR_bicubic/X{scale}", r"(.+)x{scale}"),),
            (Folders("GTmod12", "LRbicx{scale}"),),
        ),
        scales=(2, 3, 4),
        published=(count,),
    )


def _same_names(title: str, clean: str, degraded: str, *published: int) -> Layout:
    return Layout(title, ((Folders(clean, degraded),),), published=published)


def _hazy(title: str, centre_crop: bool, *published: int) -> Layout:
    """`clear/1.png` has many hazy versions `hazy/1_*.png`: its name is what stands before the first underscore."""
    many = {"name": r"(([^_]+)_.+)", "clean_name": r"\2"}
    alternatives = tuple((Folders(clear, "hazy", **many),) for clear in ("clear", "gt", "GT"))
    return Layout(title, alternatives, centre_crop=centre_crop, published=published)


def _dehazeformer(title: str, *published: int) -> Layout:
    folders = (Folders("{split}/GT", "{split}/hazy"),)
    return Layout(title, (folders,), splits=("train", "test"), published=published)


_DIV2K = Folders("DIV2K_{split}_HR", "DIV2K_{split}_LR_bicubic/X{scale}", r"(.+)x{scale}")
_FLICKR2K = Folders("Flickr2K/Flickr2K_HR", "Flickr2K/Flickr2K_LR_bicubic/X{scale}", r"(.+)x{scale}")
_FLICKR2K_BESIDE = Folders("Flickr2K_HR", "Flickr2K_LR_bicubic/X{scale}", r"(.+)x{scale}")
_DIV2K_INSIDE = Folders("DIV2K/DIV2K_{split}_HR", "DIV2K/DIV2K_{split}_LR_bicubic/X{scale}", r"(.+)x{scale}")
_IDT = ("groundtruth", "input")

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
    "sots-indoor": _hazy("SOTS indoor", True, 500),
    "sots-outdoor": _hazy("SOTS outdoor", False, 500),
    "reside-in": _dehazeformer("RESIDE-IN (DehazeFormer's packing)"),
    "reside-out": _dehazeformer("RESIDE-OUT (DehazeFormer's packing)"),
    "reside-6k": _dehazeformer("RESIDE-6K (SOTS-mix)", 6000, 1000),
    "rain100l": _same_names("Rain100L", "target", "input", 200, 100),
    "rain100h": _same_names("Rain100H", "target", "input", 1800, 100),
    "rain200l": Layout("Rain200L", ((Folders(*_IDT, r"(rain-(.+))", r"norain-\2"),),), published=(1800, 200)),
    "rain200h": Layout("Rain200H", ((Folders(*_IDT, r"(rain-(.+))", r"norain-\2"),),), published=(1800, 200)),
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
}


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
    places = {"split": split or "", "scale": str(scale or "")}
    for alternative in known.alternatives:
        parts = [_fill(folders, places) for folders in alternative]
        if all(any(root.glob(folders.clean)) for folders in parts):
            break
    else:
        wanted = " or ".join(" and ".join(_fill(f, places).clean for f in parts) for parts in known.alternatives)
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
    return Pairs(tuple(samples), scale or 1, known.centre_crop, known.title, note, left_out)


def _fill(folders: Folders, places: dict[str, str]) -> Folders:
    clean, degraded = (folder.format(**places) for folder in (folders.clean, folders.degraded))
    return Folders(clean, degraded, folders.name.replace("{scale}", places["scale"]), folders.clean_name)


def _paired(root: Path, folders: Folders, with_degraded: bool, faults: list[Fault], left_out: LeftOut) -> list[Pair]:
    samples = []
    before, star, after = folders.clean.partition("*")
    for clean in sorted(root.glob(folders.clean)):
        scene = clean.relative_to(root).as_posix()[len(before) :].removesuffix(after) if star else ""
        if is_left_over(PurePath(scene)):
            continue
        prefix = f"{scene}/" if scene else ""
        if not with_degraded:
            images = images_below(clean, faults, left_out)
            samples += [Pair(prefix + name, path, None) for name, path in images.items()]
            continue
        degraded = root / folders.degraded.replace("*", scene)
        if not degraded.is_dir():
            faults.append(Fault(f"{clean} is there, but its degraded half {degraded} is not a folder"))
            continue
        samples += match(clean, degraded, Names(folders.name, folders.clean_name), prefix, faults, left_out)
    return samples
