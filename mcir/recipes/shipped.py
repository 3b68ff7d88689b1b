"""The recipes in configs/, and what a config changes of the one that it is made from."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcir.config import RunConfig, load
from mcir.errors import UserError
from mcir.section import TAGS

OVERLAYS = ("contrasts", "arms")
"""Folders of files that are laid over a recipe, and are none by themselves."""
MOST_LINES = 10
MOST_LETTERS = 60
"""Of a value that is shown."""


def folder() -> Path:
    """configs/ of the checkout that mcir runs from, or else of the working directory. UserError where neither is."""
    for root in (Path(__file__).parents[2], Path()):
        if (root / "configs" / "quickstart.yaml").exists():
            return root / "configs"
    raise UserError("the recipes that mcir ships, configs/, are not here: run this in a checkout of mcir")


def recipe_of(files: Sequence[str | Path], name: str) -> Path | None:
    """The shipped recipe that a run is made from: one of its files, or else the one of the run's name."""
    try:
        shipped = folder()
    except UserError:
        return None
    recipes = [path for path in sorted(shipped.rglob("*.yaml")) if path.parent.name not in OVERLAYS]
    given = {Path(file).resolve() for file in files}
    named = [path for path in recipes if path.resolve() in given] or [path for path in recipes if path.stem == name]
    return named[0] if named else None


def changes(config: RunConfig, files: Sequence[str | Path]) -> list[str]:
    """`optim.optimizer.lr: 0.0002 -> 0.0005`: what a config made of `files` changes of the shipped recipe, a line each,
    below a line that names it; nothing where it changes nothing or is made from none."""
    recipe = recipe_of(files, config.name)
    if recipe is None:
        return []
    lines = list(_differences(load([recipe]).model_dump(mode="json"), config.model_dump(mode="json"), ""))
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    place = f"{recipe.parent.name}/{recipe.name}" if recipe.parent != folder() else recipe.name
    return [f"what is not as in configs/{place}:", *lines[:MOST_LINES], *more] if lines else []


def _differences(recipe: Any, own: Any, path: str) -> Iterator[str]:
    if isinstance(recipe, Mapping) and isinstance(own, Mapping):
        # of sections of two kinds only what both have can be compared
        kinds_differ = any(recipe.get(tag) != own.get(tag) for tag in TAGS if path)
        for key in recipe if kinds_differ else {**recipe, **own}:
            if key in own or not kinds_differ:
                yield from _differences(recipe.get(key), own.get(key), f"{path}.{key}" if path else key)
    elif isinstance(recipe, list) and isinstance(own, list) and len(recipe) == len(own):
        for i, pair in enumerate(zip(recipe, own, strict=True)):
            yield from _differences(*pair, f"{path}.{i}")
    elif recipe != own:
        yield f"{path}: {_shown(recipe)} -> {_shown(own)}"


def _shown(value: Any) -> str:
    for tag in TAGS:
        if isinstance(value, Mapping) and tag in value:
            return f"{value[tag]} …"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"
