"""Datasets to measure on, as the user points at them: Parquet, folders, pairs of folders, a config's validation sets.

Invariant: what the user did not say and the result depends on (how clean images are degraded, the protocol) is either
settled by what the tables do, and shown, or asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from pydantic import ValidationError

from mcir.config import load
from mcir.data.degrade import Bicubic
from mcir.data.files import IMAGE_SUFFIXES, LeftOut, files_below
from mcir.data.layouts import recognise, whose_degraded_half
from mcir.data.pairs import Fault, guess_patterns, images_below
from mcir.data.sources import FolderSource, LayoutSource
from mcir.errors import UserError
from mcir.evaluation.config import ValidationSet, set_name
from mcir.evaluation.metrics import PROTOCOLS
from mcir.evaluation.perceptual import AnyMetric
from mcir.section import is_url, parse_yaml
from mcir.weights.trained import faults, split_name

CONFIG_SUFFIXES = (".yaml", ".yml")
FORMS = (
    "[NAME=]PATH or URL of Parquet files, PATH of images or a config, NAME=CLEAN,DEGRADED folders, or NAME={source: …}"
)


@dataclass(frozen=True)
class TestSet:
    """A set that fits the scale, and how many images it holds."""

    __test__ = False  # pytest: this is no test

    data: ValidationSet
    num_images: int
    tile: int | Literal["auto"] | None = None
    """What its config says."""

    def __str__(self) -> str:
        made = "pairs as stored"
        if isinstance(self.data.source, LayoutSource):
            made += f" (layout {self.data.source.layout})"
        elif isinstance(self.data.source, FolderSource) and self.data.source.pattern != "{key}":
            made += f" (names {self.data.source.pattern})"
        if self.data.degradation is not None:
            options = self.data.degradation.model_dump(exclude={"name"}, exclude_none=True)
            settings = ", ".join(f"{key} {value}" for key, value in options.items())
            made = f"clean images degraded on the fly: {self.data.degradation.name} ({settings})"
        return f"{self.num_images} images, {made}, protocol {self.data.protocol}"


def open_sets(places: Iterable[str], scale: int, protocol: str | None = None) -> dict[str, TestSet]:
    """The sets at `places`, by name, for networks of this scale.

    A place is FORMS: a config's validation sets keep their names. Clean images without a partner are made smaller by
    MATLAB's bicubic for super-resolution. The protocol is `protocol`, else the set's own, else `sr` for
    super-resolution. UserError: nothing there, what is said does not fit the scale, or something is not said.
    """
    if protocol is not None and protocol not in get_args(PROTOCOLS):
        raise UserError(f"protocol {protocol}: there is {', '.join(get_args(PROTOCOLS))}")
    sets: dict[str, TestSet] = {}
    for place in places:
        for name, values, tile in read_place(place, scale):
            if name in sets:
                raise UserError(f"two sets are called {name}: give them names, NAME=PATH")
            sets[name] = fit(name, values, tile, scale, protocol)
    return sets


def metrics_of(places: Iterable[str]) -> tuple[AnyMetric, ...]:
    """The further metrics of the configs among `places`, each once. UserError for two of one name."""
    found: dict[str, AnyMetric] = {}
    for place in places:
        validation = load([place]).validation if place.endswith(CONFIG_SUFFIXES) else None
        for metric in validation.metrics if validation else ():
            if found.setdefault(metric.label, metric) != metric:
                raise UserError(f"the configs mean two metrics by {metric.label}: say which with --metrics")
    return tuple(found.values())


def read_place(place: str, scale: int) -> list[tuple[str, dict[str, Any], Any]]:
    """(name, the values of a ValidationSet as far as they are said, tile) of each set of a place."""
    name, equals, text = place.partition("=")
    if equals and text.lstrip().startswith("{"):
        values = parse_yaml(text, f"--data {name}")
        if not isinstance(values, dict):
            raise UserError(f"--data {place}: is no mapping such as NAME={{source: …, protocol: …}}")
        try:
            set_name(name)
        except ValueError as error:
            raise UserError(f"--data {place}: {error}") from None
        return [(name, values, None)]
    given, text = split_name(place)
    if is_url(text):
        return [(given or PurePosixPath(text).stem, {"source": {"format": "parquet", "path": text}}, None)]
    path = Path(text)
    if path.suffix in CONFIG_SUFFIXES:
        validation = load([path]).validation
        if validation is None:
            raise UserError(f"{path}: the config has no validation section")
        if given:
            raise UserError(f"--data {place}: the sets of a config have names; write {path}")
        return [(key, data.model_dump(), validation.tile) for key, data in validation.sets.items()]
    clean, _, degraded = str(path).rpartition(",")
    if clean and not path.exists():
        if not given:
            raise UserError(f"--data {place}: give the pair of folders a name, NAME=CLEAN,DEGRADED")
        return [(given, {"source": pair_source(Path(clean), Path(degraded))}, None)]
    source: dict[str, Any] = {"format": "parquet", "path": str(path)}
    if path.is_dir():
        if files_below(path, [".tar"]):
            source = {"format": "tars", "path": str(path)}
        elif not files_below(path, [".parquet"]):
            source = _folder(path, scale)
    elif path.suffix.lower() == ".tar":
        source = {"format": "tars", "path": str(path)}
    elif path.suffix.lower() != ".parquet":
        raise UserError(f"--data {place}: nothing there that can be read; give {FORMS}")
    return [(given or path.resolve().stem, {"source": source}, None)]


def pair_source(clean: Path, degraded: Path) -> dict[str, Any]:
    """Two folders; where their names differ by a pattern that pairs all of them, by that."""
    source = {"format": "folders", "clean": str(clean), "degraded": str(degraded)}
    if clean.is_dir() and degraded.is_dir():
        faults: list[Fault] = []
        halves = [images_below(folder, faults, LeftOut()) for folder in (clean, degraded)]
        if not faults and halves[0].keys() != halves[1].keys() and (guess := guess_patterns(*halves)):
            source |= {"pattern": guess[0]} | ({"clean_pattern": guess[1]} if guess[1] != "{key}" else {})
    return source


def _folder(path: Path, scale: int) -> dict[str, Any]:
    """A folder of images as a published dataset where it is one, otherwise as one set of clean images. UserError where
    it may be meant otherwise: as several sets, as pairs, as degraded images."""
    ask = f"NAME=CLEAN,DEGRADED, or 'NAME={{source: {{format: folders, clean: {path}}}}}' to take all of it as clean"
    known = recognise(path, scale)
    known = {place: pairs for place, pairs in known.items() if pairs.split != "train"} or known
    if len(known) > 1:
        names = ", ".join(" ".join(filter(None, place)) for place in known)
        raise UserError(
            f"--data {path}: reads as several sets: {names}; say which, "
            f"'NAME={{source: {{format: layout, layout: …, path: {path}, split: …}}}}', or {ask}"
        )
    for layout, split in known:
        settings = {"split": split, "scale": scale if scale > 1 else None}
        return {"format": "layout", "layout": layout, "path": str(path)} | {k: v for k, v in settings.items() if v}
    if whose := whose_degraded_half(path):
        raise UserError(
            f"--data {path}: holds the degraded images of {whose[0]}, and {whose[1]} their clean ones; give the folder "
            f"above both, or {ask}"
        )
    if scale > 1 and len(clean := [path / name for name in ("HR", "GTmod12") if (path / name).is_dir()]) == 1:
        return {"format": "folders", "clean": str(clean[0])}
    images = files_below(path, IMAGE_SUFFIXES)
    parts = sorted({image.relative_to(path).parts[0] for image in images if image.parent != path})
    if len(parts) > 1 or (parts and any(image.parent == path for image in images)):
        raise UserError(
            f"--data {path}: holds images in several folders ({', '.join(parts[:5])}{', …' * (len(parts) > 5)}), which "
            f"may be pairs or several sets; give one of them, {ask}"
        )
    return {"format": "folders", "clean": str(path)}


def fit(name: str, values: dict[str, Any], tile: Any, scale: int, protocol: str | None) -> TestSet:
    """The set with everything settled that a network of this scale needs."""
    protocol = protocol or values.get("protocol") or ("sr" if scale > 1 else None)
    if protocol is None:
        raise UserError(f"{name}: give --protocol, one of {', '.join(get_args(PROTOCOLS))}")
    if protocol == "sr" and scale == 1:
        raise UserError(f"{name}: protocol sr is for super-resolution, and the network's scale is 1; give another one")
    try:
        data = ValidationSet.model_validate({**values, "protocol": protocol})
        if protocol != values.get("protocol"):
            data = data.model_copy(update={"published": {}})  # measured otherwise: not to be compared
    except ValidationError as error:
        raise UserError(f"--data {name}: {faults(error)}") from None
    units = data.open()
    first = next(iter(units), None)
    if first is None:
        raise UserError(f"{name}: holds no images")
    if data.degradation is None and first.degraded is None:
        if scale not in (2, 3, 4):
            raise UserError(
                f"{name}: holds clean images only, and nothing says how to degrade them for scale {scale}; give pairs, "
                f"NAME=CLEAN,DEGRADED, or a degradation, '{name}={{source: …, degradation: …}}'"
            )
        data = data.model_copy(update={"degradation": Bicubic(scale=scale)})
    if data.degradation is not None and data.degradation.scale != scale:
        raise UserError(f"{name}: is degraded to scale {data.degradation.scale}, and the network's scale is {scale}")
    return TestSet(data, sum(units.lengths), tile)
