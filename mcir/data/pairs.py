"""Which images belong together: two folders in, (key, clean file, degraded file) out.

Every image of both folders takes part: a missing half, a name that does not fit or a name twice is a fault. Faults are
raised together, in one sentence with the first files, or listed whole where the caller passes a list. Names that differ
in Unicode form alone (an accent composed or not, as between Linux and macOS) are one name.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Literal

from mcir.data.files import IMAGE_SUFFIXES, LeftOut, files_below
from mcir.errors import UserError

Split = Literal["train", "validation", "test"]
"""What the Hub calls the parts of a dataset."""


@dataclass(frozen=True)
class Pair:
    """One sample on disk. `degraded` is None where it will be made on the fly."""

    key: str
    clean: Path
    degraded: Path | None
    further: tuple[Path, ...] = ()
    """Images of the clean one's size, in the order of `Pairs.columns`."""

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.clean, *([self.degraded] if self.degraded else []), *self.further)


@dataclass(frozen=True)
class Pairs:
    """The samples of a dataset in the order of their keys, and what holds for all of them."""

    samples: tuple[Pair, ...]
    scale: int = 1
    """Clean side / degraded side."""
    centre_crop: bool = False
    """Clean images may be larger: their centre, of the degraded image's size, is the clean half (RESIDE indoor)."""
    title: str = ""
    note: str = ""
    """Where the count differs from the published one: what was expected."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Files in the folders that take no part, and why."""
    split: Split = "train"
    """What the samples are for, as far as a published dataset says."""
    columns: tuple[str, ...] = ()
    """Names of further images of each sample."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with some files, and how to mend it."""

    what: str
    files: tuple[str, ...] = ()
    way_out: str = ""

    def __str__(self) -> str:
        more = f" and {len(self.files) - 5} more" if len(self.files) > 5 else ""
        files = ", ".join(self.files[:5]) + more
        return ": ".join(filter(None, (self.what, files))) + (f"; {self.way_out}" if self.way_out else "")

    def lines(self) -> list[str]:
        """A sentence for each file, and the way out once."""
        lines = [f"{self.what}: {file}" for file in self.files] or [self.what]
        return [*lines[:-1], lines[-1] + (f"; {self.way_out}" if self.way_out else "")]


@dataclass(frozen=True)
class Names:
    """How a degraded image's name leads to its clean one. A name is the path inside the folder, without suffix."""

    degraded: str = r"(.+)"
    """Regular expression of the degraded image's name; group 1 is the key."""
    clean: str = r"\1"
    """The clean image's name, of the groups of `degraded`."""
    suffixes: tuple[str, str] = "", ""
    """Which the degraded and the clean file must have; empty: any."""
    clean_names: str = ""
    """Regular expression of clean images' names, which tells them from degraded ones in the same folder."""
    pattern: str = ""
    """As the user gave it."""

    @classmethod
    def parse(cls, pattern: str, clean_pattern: str) -> "Names":
        """Of patterns such as `{key}x4.png`: `{key}` is what both names share, `*` in `pattern` what many degraded
        images of one clean one differ in. UserError where they are none."""
        for text in (pattern, clean_pattern):
            if "{key}" not in text or re.search(r"[{}]", text.replace("{key}", "")):
                raise UserError(
                    f"the pattern {text!r} of names must hold {{key}}, such as {{key}}x4.png, and no other {{}}"
                )
        if "*" in clean_pattern:
            raise UserError(f"a pattern of clean names leads to one file and holds no *: {clean_pattern}")
        (stem, suffix), (clean_stem, clean_suffix) = _split_suffix(pattern), _split_suffix(clean_pattern)
        first, *rest = stem.split("{key}")
        parts = [_regex(first), r"(?P<key>.+)", *(r"(?P=key)" * (i > 0) + _regex(part) for i, part in enumerate(rest))]
        whole = "".join(parts)
        # One degraded image to a clean one: they share the key. Many: each is named after itself.
        degraded = f"({whole})" if "*" in stem else whole
        clean = clean_stem.replace("\\", r"\\").replace("{key}", r"\g<key>")
        clean_names = ".+".join(map(re.escape, clean_stem.split("{key}")))
        return cls(degraded, clean, (suffix, clean_suffix), clean_names, pattern)


def pair_folders(
    clean: Path,
    degraded: Path | None = None,
    scale: int = 1,
    pattern: str = "{key}",
    clean_pattern: str = "{key}",
    faults: list[Fault] | None = None,
) -> Pairs:
    """Two folders whose names fit the patterns (the same relative names by default; suffixes may differ), or one folder
    of clean images.

    Raises UserError where something does not fit; that goes to `faults` instead where they are given.
    """
    names = Names.parse(pattern, clean_pattern)
    for folder in (clean, degraded):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
    if degraded is None and names != Names.parse("{key}", "{key}"):
        raise UserError(f"the pattern {pattern!r} goes with pairs: give the folder of the degraded images too")
    found: list[Fault] = []
    left_out = LeftOut()
    images = images_below(clean, found, left_out)
    if degraded is None:
        samples = [Pair(name, path, None) for name, path in images.items()]
    else:
        samples = match(clean, degraded, names, "", found, left_out, images)
    settle(found, faults)
    return Pairs(tuple(samples), scale, title=clean.name, left_out=left_out)


def with_columns(pairs: Pairs, folders: Mapping[str, Path], faults: list[Fault] | None = None) -> Pairs:
    """The samples with a further image from each folder, such as what other networks restored: of the name of the
    sample's key, or of its degraded image. Raises UserError as `pair_folders`: no image may be missing or left over."""
    found: list[Fault] = []
    further: list[list[Path]] = [[] for _ in pairs.samples]
    for column, folder in folders.items():
        if column in ("clean", "degraded", "key") or not column.isidentifier():
            raise UserError(f"a further column cannot be called {column!r}: take letters, and none of the three names")
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        images = images_below(folder, found, pairs.left_out)
        chosen = [images.get(pair.key) or images.get(_name_of_degraded(pair)) for pair in pairs.samples]
        missing = [pair.key for pair, path in zip(pairs.samples, chosen, strict=True) if path is None]
        unused = sorted(set(images.values()) - set(chosen))
        if missing:
            found.append(Fault(f"column {column}: {folder} holds no image of these keys", tuple(missing)))
        if unused:
            names = tuple(str(path.relative_to(folder)) for path in unused)
            found.append(Fault(f"column {column}: images in {folder} that belong to no sample", names))
        for paths, path in zip(further, chosen, strict=True):
            paths += [path] if path else []
    settle(found, faults)
    if found:
        return pairs
    samples = [replace(pair, further=tuple(paths)) for pair, paths in zip(pairs.samples, further, strict=True)]
    return replace(pairs, samples=tuple(samples), columns=tuple(folders))


def _name_of_degraded(pair: Pair) -> str:
    """With what goes in front of the key, such as a scene's folder."""
    stem = (pair.degraded or pair.clean).stem
    return unicodedata.normalize("NFC", PurePath(pair.key).with_name(stem).as_posix())


def settle(found: list[Fault], faults: list[Fault] | None) -> None:
    """Hand the faults over where somebody lists them; UserError with all of them otherwise."""
    if faults is not None:
        faults += found
    elif found:
        raise UserError("; ".join(map(str, found)))


def match(
    clean: Path,
    degraded: Path,
    names: Names,
    prefix: str,
    faults: list[Fault],
    left_out: LeftOut,
    clean_images: Mapping[str, Path] | None = None,
) -> list[Pair]:
    """The pairs of two folders, or of one that holds both halves; their keys begin with `prefix`."""
    sharp = images_below(clean, faults, left_out) if clean_images is None else clean_images
    if clean == degraded:
        both = sharp
        sharp = {name: path for name, path in both.items() if re.fullmatch(names.clean_names, name)}
        shown = {name: path for name, path in both.items() if name not in sharp}
    else:
        shown = images_below(degraded, faults, left_out)
    samples, odd, lonely = _match(sharp, shown, names, prefix)
    used = {pair.clean for pair in samples}
    unused = [path for path in sharp.values() if path not in used]
    way_out = _way_out(sharp, shown) if (odd or lonely or unused) and sharp and shown else ""
    missing = [
        (f"{degraded}: names that do not read as {names.pattern or names.degraded!r}", odd),
        (f"degraded images without their clean half in {clean}", lonely),
        (f"clean images without a degraded half in {degraded}", unused),
    ]
    groups = [(what, paths) for what, paths in missing if paths]
    for i, (what, paths) in enumerate(groups):
        inside = tuple(str(path.relative_to(clean if path.is_relative_to(clean) else degraded)) for path in paths)
        faults.append(Fault(what, inside, way_out if i == len(groups) - 1 else ""))
    return samples


def _match(
    clean: Mapping[str, Path], degraded: Mapping[str, Path], names: Names, prefix: str = ""
) -> tuple[list[Pair], list[Path], list[Path]]:
    """Pairs, degraded images whose name does not fit, degraded images whose clean one is missing."""
    samples, odd, lonely = list[Pair](), list[Path](), list[Path]()
    suffix, clean_suffix = names.suffixes
    for name, path in degraded.items():
        found = re.fullmatch(names.degraded, name) if not suffix or path.suffix.lower() == suffix else None
        if found is None:
            odd.append(path)
            continue
        partner = clean.get(found.expand(names.clean))
        if partner is None or (clean_suffix and partner.suffix.lower() != clean_suffix):
            lonely.append(path)
        else:
            samples.append(Pair(prefix + found[1], partner, path))
    return samples, odd, lonely


def guess_patterns(clean: Mapping[str, Path], degraded: Mapping[str, Path]) -> tuple[str, str] | None:
    """Patterns of degraded and clean names under which all images of both folders take part, where they are easily
    found: what one name has more than the other, before or behind."""
    name = next(iter(degraded))
    if inside := max((other for other in clean if other in name), key=len, default=""):
        before, _, behind = name.partition(inside)
        tried = [(f"{before}{{key}}{behind}", "{key}")]
        if behind and not behind[0].isalnum():
            parts = len(behind[1:].split(behind[0]))
            tried.append((before + "{key}" + f"{behind[0]}*" * parts, "{key}"))
    elif around := next((other for other in clean if name in other), ""):
        before, _, behind = around.partition(name)
        tried = [("{key}", f"{before}{{key}}{behind}")]
    else:
        other = max(clean, key=lambda other: _num_equal(name, other))
        start = _num_equal(name, other)
        while start and not name[start - 1].isalnum():
            start -= 1
        tried = [(f"{{key}}{name[start:]}", f"{{key}}{other[start:]}")] if start else []
    for pattern, clean_pattern in tried:
        if any(char in pattern.replace("{key}", "") + clean_pattern.replace("{key}", "") for char in "{}"):
            continue
        samples, *rest = _match(clean, degraded, Names.parse(pattern, clean_pattern))
        if not any(rest) and len({pair.clean for pair in samples}) == len(clean):
            return pattern, clean_pattern
    return None


def _way_out(clean: Mapping[str, Path], degraded: Mapping[str, Path]) -> str:
    published = "a published dataset has a --layout"
    if guess := guess_patterns(clean, degraded):
        options = [f"--pattern '{guess[0]}'"] + [f"--clean-pattern '{guess[1]}'"] * (guess[1] != "{key}")
        fields = [f"pattern: '{guess[0]}'"] + [f"clean_pattern: '{guess[1]}'"] * (guess[1] != "{key}")
        return f"{' '.join(options)} (in a config {', '.join(fields)}) pairs all of them; {published}"
    return f"names that differ take a pattern, such as --pattern '{{key}}x4'; {published}"


def images_below(folder: Path, faults: list[Fault], left_out: LeftOut) -> dict[str, Path]:
    """Image files below `folder`, sorted, by their name."""
    images: dict[str, Path] = {}
    for path in files_below(folder, IMAGE_SUFFIXES, left_out):
        if not path.is_file():
            faults.append(Fault(f"{path} leads to no file: remove it, or mend the link"))
            continue
        name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
        if other := images.get(name):
            form = " (they differ in Unicode form)" if other.stem != path.stem else ""
            faults.append(Fault(f"two images of one name{form}: {other} and {path}; rename or remove one"))
            continue
        images[name] = path
    if not images:
        faults.append(Fault(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"))
    return images


def repeated_keys(samples: Iterable[Pair]) -> list[Fault]:
    seen: dict[str, Pair] = {}
    return [
        Fault(f"two samples have the key {pair.key}: {other.clean} and {pair.clean}")
        for pair in samples
        if (other := seen.setdefault(pair.key, pair)) is not pair
    ]


def _split_suffix(pattern: str) -> tuple[str, str]:
    suffix = PurePath(pattern).suffix
    known = suffix.lower() in IMAGE_SUFFIXES
    return (pattern.removesuffix(suffix), suffix.lower()) if known else (pattern, "")


def _regex(text: str) -> str:
    return "[^/]*".join(map(re.escape, unicodedata.normalize("NFC", text).split("*")))


def _num_equal(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
