"""`mcir init`: a short commented config for one's own data, which trains as it is.

Data, scale and sizes are found out by looking (look.py); steps, batch, loss, optimizer and schedule are those of the
network's own recipe in configs/, where it has one; the contrast is that of configs/contrasts/spn.yaml. What was
assumed stands in a comment beside its field.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mcir.archs.base import Arch
from mcir.config import RunConfig, validate
from mcir.data.chain import AnyDegradation
from mcir.errors import UserError
from mcir.recipes.look import Found, look
from mcir.recipes.network import USUAL, Recipe, build_section, recipe_for, scales_of, section_of
from mcir.recipes.shipped import folder as shipped_dir
from mcir.section import parse_yaml, to_line
from mcir.train.memory import plan

PATCH = {True: 64, False: 128}
"""Side of the degraded crop of a network without a recipe: of one that enlarges, and of others."""
SMALL_SHARE = {"psnr": 5e-3, "ssim": 5e-3}
"""Of the contrast beside losses that are -PSNR or -SSIM (configs/deblur/nafnet_w32_gopro.yaml); others: 0.05."""


def init(
    network: str,
    data: Path,
    output: Path | None = None,
    scale: int | None = None,
    degradation: str | None = None,
) -> list[str]:
    """Write the config of a run of `network` on what is in the folder `data`; what is said of it, a line each.

    `network` is one of ours (`edsr`, `swinir:light`), a name of spandrel's (HAT) or an arch section. `scale` and
    `degradation` are for what looking cannot say: of a folder of clean images, or of one with several scales.
    UserError: no such network, a folder that cannot be trained on, a file that is there already.
    """
    given = section_of(network)
    output = output or Path(f"{_label(given)}_{_plain(data.resolve().name)}.yaml")
    if output.exists():
        raise UserError(f"{output} is there already: choose another --output, or remove it")
    recipe = recipe_for(given)
    scales = scales_of(given, scale)
    found = look(data, scales, all_clean=degradation is not None)
    wanted, degrade = _degradation(found, given, scales, data, degradation)
    arch, section = build_section(given, recipe, wanted)
    name = _plain(output.stem)
    values, notes = _values(name, arch, section, found, degrade, recipe)
    notes["degradation"] = "as asked for" if degradation else "assumed: MATLAB's, of which benchmarks are made"
    config = validate(values, str(output))
    text = "\n".join(_text(config, values, notes, found, recipe, output)) + "\n"
    validate(parse_yaml(text, str(output)), str(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    held_out = "validated on " + _place(found.held_out) if found.held_out else "without validation (the file says why)"
    return [f"{output}: {network}{f' x{wanted}' * (wanted > 1)} on {found}, {held_out}", f"mcir train {output}"]


def _degradation(
    found: Found, given: Mapping[str, Any], scales: tuple[int, ...], data: Path, said: str | None
) -> tuple[int, dict[str, Any] | None]:
    """The scale of the run, and how clean images are degraded."""
    label = given.get("architecture", given["name"])
    if found.scale is not None:
        if found.scale not in scales:
            fits = " or ".join(f"x{scale}" if scale > 1 else "of one size" for scale in scales)
            has = f"x{found.scale}" if found.scale > 1 else "of one size"
            raise UserError(f"--data {data}: the pairs are {has}, and {label} takes pairs {fits}")
        if said:
            raise UserError(f"--data {data}: holds pairs, which --degradation would degrade once more: leave it out")
        return found.scale, None
    if said:
        values = parse_yaml(said, "--degradation")
        try:
            scale = TypeAdapter[Any](AnyDegradation).validate_python(values).scale
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise UserError(f"--degradation {said}: {where}{': ' * bool(where)}{fault['msg']}") from None
        if scale not in scales:
            raise UserError(f"--degradation {said}: its scale is {scale}, {label} has {' or '.join(map(str, scales))}")
        return scale, values
    if scales == (1,):
        raise UserError(
            f"--data {data}: holds clean images alone, and {label} keeps the size: say how they are degraded, such as "
            "--degradation '{name: noise, sigma: 25}'"
        )
    if len(scales) > 1:
        listed = ", ".join(str(scale) for scale in scales if scale > 1)
        ones = ", or for a network that keeps the size --degradation" if 1 in scales else ""
        raise UserError(f"--data {data}: holds clean images alone: say --scale, {listed}{ones}")
    return scales[0], {"name": "bicubic", "scale": scales[0]}


def _values(
    name: str, arch: Arch, section: dict[str, Any], found: Found, degrade: dict[str, Any] | None, recipe: Recipe
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config's values, and what is to be said beside some fields."""
    own, scale, notes = recipe.values, arch.descriptor.scale, {}
    crop, notes["crop_size"] = _crop(arch, found, recipe)
    sees_all = found.num_looked_at == found.num_samples
    data: dict[str, Any] = {"train": [_set(found.train, degrade)], "crop_size": crop}
    if crop > found.sides[0] or not sees_all:
        data["small_images"] = "reflect"
        notes["small_images"] = "what is smaller than the crop is mirrored at its border"
    data["augment"] = own["data"].get("augment", "dihedral")
    terms = own["objective"]["reconstruction"]
    contrast = parse_yaml((shipped_dir() / "contrasts" / "spn.yaml").read_text(encoding="utf-8"), "spn.yaml")
    contrast = contrast["objective"]["contrast"]
    first = (terms[0] if isinstance(terms, list) else terms)["name"]
    contrast["features"].pop("normalise", None)  # the default
    contrast["weight"] = {"target_ratio": SMALL_SHARE.get(first, 0.05)}
    values: dict[str, Any] = {
        "name": name,
        "steps": own["steps"],
        "batch_size": own["batch_size"],
        "accumulate": "auto",
        "arch": section,
        "data": data,
        "objective": {"reconstruction": terms, "contrast": contrast},
        "optim": own["optim"],
    }
    if own.get("ema_decay"):
        values["ema_decay"] = own["ema_decay"]
    if found.held_out:
        held_out = _set(found.held_out, degrade) | {"protocol": "sr" if scale > 1 else "rgb"}
        every = own.get("validation", USUAL["validation"])["every"]
        values["validation"] = {"every": every, "tile": "auto", "sets": {"held_out": held_out}}
    config = validate(values, name)
    try:
        size = sum(plan(config, "single", 1).values()) / 2**30
        notes["accumulate"] = f"by the memory plan: one batch takes {size:.3g} GiB, and is split where it does not fit"
    except UserError:  # a network that computes with values, of which a plan has none
        values["accumulate"], notes["accumulate"] = 1, "a number; the memory plan cannot look into this network"
    return values, notes


def _set(source: dict[str, Any], degrade: dict[str, Any] | None) -> dict[str, Any]:
    return {"source": source} | ({"degradation": degrade} if degrade else {})


def _crop(arch: Arch, found: Found, recipe: Recipe) -> tuple[int, str]:
    """The recipe's crop, smaller where the images are, and why it is what it is."""
    net = arch.descriptor
    if net.fixed_size:
        return net.fixed_size * net.scale, "the one size that the network takes"
    crop = (recipe.patch or PATCH[net.scale > 1]) * net.scale
    step = net.scale * net.size_multiple
    least = -(-max(net.min_size, 8) // net.size_multiple) * step
    fitting = max(least, min(crop, found.small) // step * step)
    if fitting == crop:
        return crop, "pixels of the clean image" + (", as in the recipe" if recipe.place else "")
    return fitting, f"pixels of the clean image; {'the recipe has' if recipe.place else 'usual are'} {crop}"


def _text(
    config: RunConfig, values: Mapping[str, Any], notes: Mapping[str, str], found: Found, recipe: Recipe, output: Path
) -> Iterator[str]:
    """The lines of the file."""
    label = values["arch"].get("architecture", config.arch.name)
    yield f"# {label} on {_place(found.train)}: {found}."
    yield "# Written by `mcir init` and trains as it is; `mcir config schema` explains every field:"
    yield f"#   mcir train {output}"
    if recipe.place:
        without = ", without its growing crops" if "stages" in recipe.values else ""
        yield f"# Steps, batch, loss, optimizer and schedule are those of configs/{recipe.place}{without}."
    else:
        yield f"# No recipe of {label} is shipped: steps, batch, loss, optimizer and schedule are what is usual."
    yield f"name: {to_line(config.name)}"
    yield f"steps: {config.steps}"
    yield f"batch_size: {config.batch_size}  # of all processes together"
    yield f"accumulate: {values['accumulate']}  # {notes['accumulate']}"
    yield f"arch: {to_line(values['arch'])}"
    yield "data:"
    yield "  train:"
    data = values["data"]
    yield f"    - source: {to_line(data['train'][0]['source'])}"
    degrade = data["train"][0].get("degradation")
    if degrade:
        yield f"      degradation: {to_line(degrade)}  # {notes['degradation']}"
    for key, value in data.items():
        if key != "train":
            yield f"  {key}: {to_line(value)}" + (f"  # {notes[key]}" if key in notes else "")
    yield "objective:"
    terms = values["objective"]["reconstruction"]
    if isinstance(terms, list):
        yield from ("  reconstruction:", *(f"    - {to_line(term)}" for term in terms))
    else:
        yield f"  reconstruction: {to_line(terms)}"
    yield "  contrast:  # away from its own past; in place of all this `contrast: null` trains without"
    for key, value in values["objective"]["contrast"].items():
        if key == "negatives":
            yield "    negatives:"
            yield from (f"      - {to_line(negative)}" for negative in value)
        else:
            said = {
                "weight": "share of the reconstruction loss that the contrast has",
                "features": "its ImageNet weights are downloaded once",
            }.get(key)
            yield f"    {key}: {to_line(value)}" + (f"  # {said}" if said else "")
    yield "optim:"
    yield from (f"  {key}: {to_line(value)}" for key, value in values["optim"].items())
    if config.ema_decay:
        yield f"ema_decay: {config.ema_decay}  # averaged weights, which are validated"
    yield from _validation(config, values, found)


def _validation(config: RunConfig, values: Mapping[str, Any], found: Found) -> Iterator[str]:
    scale = config.arch.descriptor.scale
    if found.held_out:
        validation = values["validation"]
        yield "validation:"
        yield f"  every: {validation['every']}"
        yield "  tile: auto  # whole images where they fit into memory"
        yield "  sets:"
        yield f"    held_out: {to_line(validation['sets']['held_out'])}"
        return
    example = _set({"format": "folders", "clean": "…", **({} if found.scale is None else {"degraded": "…"})}, None)
    if "degradation" in values["data"]["train"][0]:
        example["degradation"] = values["data"]["train"][0]["degradation"]
    example["protocol"] = "sr" if scale > 1 else "rgb"
    yield f"# No validation: {_place(found.train)} has no folder `valid` or `test` beside it, and a score on"
    yield "# images that are trained on says little. Put some aside, and:"
    yield f"# validation: {{every: {USUAL['validation']['every']}, tile: auto, sets: {{held_out: {to_line(example)}}}}}"


def _place(source: Mapping[str, Any]) -> str:
    return str(source.get("path") or source["clean"])


def _label(given: Mapping[str, Any]) -> str:
    words = [str(given.get("architecture") or given["name"]), str(given.get("variant", ""))]
    return _plain("_".join(filter(None, words)).lower())


def _plain(text: str) -> str:
    """As a run may be called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "data"
