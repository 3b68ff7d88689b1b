"""Which network a name means, and the recipe in configs/ that is its own."""

import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mcir import archs
from mcir.archs.base import Arch
from mcir.errors import UserError
from mcir.recipes.shipped import folder
from mcir.section import parse_yaml

KINDS: dict[str, Any] = {
    kind.model_fields["name"].default: kind for kind in typing.get_args(typing.get_args(archs.AnyArch)[0])
}
OURS = [name for name in KINDS if name not in ("zoo", "import")]
TASKS = ("sr", "dehaze", "derain", "deblur", "published")
"""Folders of configs/ with recipes of one network each."""
USUAL: dict[str, Any] = {
    "steps": 300_000,
    "batch_size": 16,
    "data": {"augment": "dihedral"},
    "objective": {"reconstruction": {"name": "l1"}},
    "optim": {
        "optimizer": {"name": "adam", "lr": 2e-4, "betas": [0.9, 0.99]},
        "schedule": {"name": "cosine", "min_lr": 1e-6},
    },
    "ema_decay": 0.999,
    "validation": {"every": 5000},
}
"""Where a network has no recipe; of what most published ones have."""
SCALE_NAMES = ("upscale", "scale", "upscaling_factor", "upscale_factor", "up_scale")
"""What networks of spandrel call their scale."""


@dataclass(frozen=True)
class Recipe:
    """Values of a shipped config, and its place below configs/."""

    values: Mapping[str, Any]
    place: str = ""

    @property
    def patch(self) -> int | None:
        """Side of the degraded crop; None where there is no recipe of the network's own."""
        return self.values["data"]["crop_size"] // _scale_in(self.values["arch"]) if self.place else None


def section_of(network: str) -> dict[str, Any]:
    """The arch section as far as it is said."""
    if network.lstrip().startswith("{"):
        values = parse_yaml(network, network)
        if not isinstance(values, dict) or "name" not in values:
            raise UserError(f"{network}: an arch section begins with its name, such as '{{name: edsr, scale: 2}}'")
        return values
    name, colon, variant = network.partition(":")
    if name.lower() not in OURS:
        _require_in_zoo(network)
        return {"name": "zoo", "architecture": network}
    fields = KINDS[name.lower()].model_fields
    if colon and "variant" not in fields:
        raise UserError(f"{network}: {name} has no variants; settings go as '{{name: {name.lower()}, …}}'")
    if not colon and "variant" in fields and fields["variant"].is_required():
        options = ", ".join(f"{name.lower()}:{option}" for option in typing.get_args(fields["variant"].annotation))
        raise UserError(f"{network}: say which one, {options}")
    return {"name": name.lower()} | ({"variant": variant} if colon else {})


def _require_in_zoo(network: str) -> None:
    try:
        archs.parse({"name": "zoo", "architecture": network})
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        if "spandrel has no" in said and (near := difflib.get_close_matches(network.lower(), OURS, n=1)):
            raise UserError(f"there is no network {network}: did you mean {near[0]}?") from None
        if "spandrel has no" in said:
            raise UserError(f"there is no network {network}; mcir's own are {', '.join(OURS)}, and {said}") from None


def scales_of(given: Mapping[str, Any], scale: int | None) -> tuple[int, ...]:
    """Which the network may have, as far as that is known."""
    kind = KINDS.get(given["name"])
    if kind is None:
        raise UserError(f"there is no network {given['name']}: mcir has {', '.join(KINDS)}")
    if given["name"] not in OURS:
        known: tuple[int, ...] = (given["scale"],) if "scale" in given else (1, 2, 3, 4, 8)
    elif "scale" not in kind.model_fields:
        known = (1,)
    else:
        known = (given["scale"],) if "scale" in given else typing.get_args(kind.model_fields["scale"].annotation)
    if scale is not None and scale not in known:
        raise UserError(f"--scale {scale}: {given['name']} has {' or '.join(map(str, known))}")
    return known if scale is None else (scale,)


def recipe_for(given: Mapping[str, Any]) -> Recipe:
    """The network's own in configs/: from scratch, of its variant and on pairs as they are where there are several."""
    found: list[tuple[tuple[bool, ...], int, Recipe]] = []
    for path in (path for task in TASKS for path in sorted((folder() / task).glob("*.yaml"))):
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        if _is_of(values["arch"], given):
            arch, trained = values["arch"], values["data"]["train"]
            fits = all(arch.get(key) == given[key] for key in ("variant", "scale") if key in given)
            rank = ("init_from" in values, any("degradation" in source for source in trained), not fits)
            found.append((rank, len(found), Recipe(values, f"{path.parent.name}/{path.name}")))
    return min(found)[2] if found else Recipe(USUAL)


def _is_of(arch: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether the network of a recipe is the one that is given. The classes of other repositories are spandrel's."""
    if given["name"] != "zoo":
        return arch["name"] == given["name"] and arch.get("target") == given.get("target")
    its = arch.get("architecture") or str(arch.get("target", "")).rpartition(":")[2]
    return arch["name"] in ("zoo", "import") and its.lower() == str(given.get("architecture", "")).lower()


def build_section(given: Mapping[str, Any], recipe: Recipe, scale: int) -> tuple[Arch, dict[str, Any]]:
    """The network, and its section: what is given, over what its recipe has."""
    own: Mapping[str, Any] = recipe.values.get("arch", {})
    same = own.get("name") == given["name"] and own.get("variant") == given.get("variant", own.get("variant"))
    base = {key: value for key, value in own.items() if key != "scale"} if same else {}
    tried: list[dict[str, Any]] = []
    if given["name"] != "zoo":
        tried = [base | dict(given) | ({"scale": scale} if "scale" in KINDS[given["name"]].model_fields else {})]
    else:
        parameters = {k: v for k, v in base.get("parameters", {}).items() if k not in SCALE_NAMES}
        parameters |= given.get("parameters", {})
        extras: list[dict[str, Any]] = [{}, *({name: scale} for name in SCALE_NAMES)]
        for needed in ({"num_in_ch": 3, "num_out_ch": 3}, {"upsampler": "pixelshuffle"}):
            extras += [{name: scale, **needed} for name in SCALE_NAMES]
        for extra in extras:
            chosen = extra | parameters
            tried.append(base | dict(given) | ({"parameters": chosen} if chosen else {}))
    failed, has = "", 0
    for section in tried:
        try:
            arch = archs.parse(section)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"][1:])
            failed = failed or f"{where}{': ' if where else ''}{fault['msg'].removeprefix('Value error, ')}"
            continue
        if arch.descriptor.scale == scale:
            return arch, section
        has = has or arch.descriptor.scale
    label = given.get("architecture", given["name"])
    way_out = f"give it as '{{name: {given['name']}, architecture: {label}, parameters: {{…}}}}'"
    if has:
        raise UserError(f"{label} as it is by default has scale {has}, and the data have {scale}: {way_out}")
    raise UserError(f"{label}: {failed}" + (f": {way_out}" if "needs the arguments" in failed else ""))


def _scale_in(arch: Mapping[str, Any]) -> int:
    """Of a recipe's network."""
    said = {**arch.get("parameters", {}), **arch.get("arguments", {}), **arch}
    return next((said[name] for name in SCALE_NAMES if name in said), 1)
