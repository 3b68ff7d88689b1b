"""Which files of a folder (or tar) take part: one rule for all sources, for packing, inspecting and restoring.

Left out is what people did not put there: files and folders whose name begins with a dot (.ipynb_checkpoints,
.Trash-1000, the ._* files of macOS) and those of `_LEFT_OVER`, at any depth below what the user named. Everything else
is told apart by its suffix, in capitals or not. Whoever wants to know what was left out, and why, passes a list.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path, PurePath

from mcir.errors import UserError

IMAGE_SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".jpf", ".jpx", ".webp", ".avif", ".bmp", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".gif",
})  # fmt: skip
_LEFT_OVER = frozenset({
    "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "lost+found",
    "system volume information",
})  # fmt: skip
"""Folders of macOS, Synology, QNAP, Windows and ext4, in lower case."""
_OF_A_DATASET = frozenset({"README.md", ".pack.json", ".pack.lock", ".gitattributes"})
"""Beside its shards, and not worth a word."""


@dataclass
class LeftOut:
    """Files and members that took no part: how many for which reason, and the first few of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= 3:
            self.examples.setdefault(reason, []).append(path)

    def lines(self) -> list[str]:
        return [
            f"{count:,} {reason} ({', '.join(self.examples[reason])}{', ...' * (count > 3)})"
            for reason, count in sorted(self.counts.items())
        ]


def is_left_over(path: PurePath) -> bool:
    """Whether a name on the path (relative to what the user named) is one that file managers and tools leave behind."""
    return any((part[0] == "." and part != "..") or part.lower() in _LEFT_OVER for part in path.parts)


def why_left_out(path: PurePath, suffixes: Iterable[str]) -> str:
    """The reason why a file (relative to what the user named) takes no part; empty where it does."""
    if is_left_over(path):
        return "hidden, or left over by a file manager"
    if path.suffix.lower() not in suffixes:
        return f"of a kind that is not read, {path.suffix.lower() or 'without a suffix'}"
    return ""


def files_below(folder: Path, suffixes: Iterable[str], left_out: LeftOut | None = None) -> list[Path]:
    """Files that take part and have one of the suffixes (in lower case), sorted, also those behind links to folders.
    UserError where a link leads back to a folder above it, or a name is not UTF-8."""
    wanted, files = frozenset(suffixes), list[Path]()
    left_out = LeftOut() if left_out is None else left_out

    def leave_out(path: Path) -> bool:
        reason = why_left_out(path.relative_to(folder), wanted)
        if reason and path.name not in _OF_A_DATASET:
            left_out.add(reason, os.fsencode(path).decode(errors="backslashreplace"))
        return bool(reason)

    for parent, folders, names in os.walk(folder, followlinks=True):
        above = Path(parent).resolve()
        for name in [name for name in folders if is_left_over(PurePath(name))]:
            folders.remove(name)
            for inside, _, hidden in os.walk(Path(parent, name)):
                for file in hidden:
                    leave_out(Path(inside, file))
        for name in folders:
            path = Path(parent, name)
            if path.is_symlink() and above.is_relative_to(path.resolve()):
                raise UserError(f"{path} is a link to a folder above it: remove it")
        for name in names:
            if leave_out(Path(parent, name)):
                continue
            try:
                name.encode()
            except UnicodeEncodeError:
                raise UserError(f"{parent} has a name that is not UTF-8, {os.fsencode(name)!r}: rename it") from None
            files.append(Path(parent, name))
    return sorted(files)


def files_at(place: str, suffix: str, left_out: LeftOut | None = None) -> list[Path]:
    """The files of one suffix at a folder (any depth), a file or a pattern (which sees what is left over only where it
    names it)."""
    path = Path(place)
    if path.is_dir():
        return files_below(path, [suffix], left_out)
    if path.is_file():
        return [path]
    parts = path.parts
    fixed = next((i for i, part in enumerate(parts) if has_magic(part)), len(parts))
    root, pattern = Path(*parts[:fixed]), Path(*parts[fixed:])
    if not pattern.parts:
        return []
    hidden = is_left_over(pattern)
    return sorted(
        p for p in root.glob(str(pattern)) if p.is_file() and (hidden or not is_left_over(p.relative_to(root)))
    )
