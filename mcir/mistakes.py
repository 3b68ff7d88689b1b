"""What is wrong with a config, a line for each mistake: the path as the user wrote it, what is wrong, what may be
meant."""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from mcir.section import TAGS, CredentialsInURL


def explained(
    error: ValidationError, values: Mapping[str, Any], model: type[BaseModel]
) -> tuple[list[str], set[tuple[Any, ...]]]:
    """The lines (several for contradictions that a section finds), and the places of `values` that are wrong."""
    # A list whose items are wrong is also reported as too short: that is no mistake of the user's.
    faults = [f for f in error.errors() if f["type"] != "too_short" or len(f["input"]) < f["ctx"]["min_length"]]
    lines: list[str] = []
    wrong: set[tuple[Any, ...]] = set()
    for fault in _as_meant(faults, values, model):
        path, parent, _ = _where(fault["loc"], values, model)
        if not path and fault["type"] == "value_error":
            lines += map(str, fault["ctx"]["error"].args)
        else:
            lines.append(_sentence(fault, ".".join(map(str, path)), parent))
        wrong |= {path} if fault["loc"] else set()
    return lines, wrong


def _as_meant(faults: Sequence[Any], values: Mapping[str, Any], model: Any, start: int = 0) -> list[Any]:
    """The faults, where each alternative of a field found its own: those of the one that the value comes nearest to,
    or all in one."""
    kept: list[Any] = []
    fields: dict[tuple[Any, ...], dict[Any, list[Any]]] = {}
    for fault in faults:
        loc = fault["loc"]
        if places := [place for place in _where(loc, values, model)[2] if place >= start]:
            fields.setdefault(loc[: places[0]], {}).setdefault(loc[places[0]], []).append(fault)
        else:
            kept.append(fault)
    for field, alternatives in fields.items():
        near = max(alternatives.values(), key=lambda found: (max(len(f["loc"]) for f in found), not _of_kind(found[0])))
        if len(near[0]["loc"]) == len(field) + 1 and _of_kind(near[0]):
            texts = [found[0]["msg"].removeprefix("Input should be ") for found in alternatives.values()]
            kept.append({**near[0], "loc": field, "msg": f"Input should be {', or '.join(texts)}"})
        else:
            kept += _as_meant(near, values, model, len(field) + 1)
    return kept


def _of_kind(fault: Any) -> bool:
    """Whether the value is of another kind altogether."""
    return fault["type"] == "literal_error" or fault["type"].endswith(("_type", "_parsing"))


def _where(loc: Sequence[Any], values: Mapping[str, Any], model: Any) -> tuple[tuple[Any, ...], Any, list[int]]:
    """The keys as the user wrote them, the annotation of what holds the last, and the places of `loc` that name an
    alternative of a field."""
    path: list[Any] = []
    alternatives: list[int] = []
    node: Any = values
    annotation: Any = model
    parent = annotation
    for place, part in enumerate(loc):
        if isinstance(part, int) and isinstance(node, Mapping):  # one entry given in place of a list
            annotation, _ = _descend(annotation, part)
            continue
        inside = part in (node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, list) else ())
        below, is_tag = _descend(annotation, part)
        if below is None and not inside:
            alternatives.append(place)
            continue
        parent, annotation = annotation, below
        if is_tag and not inside:
            continue  # a discriminator's value, which the user did not write as a key
        path.append(part)
        node = node[part] if inside else None
    return tuple(path), parent, alternatives


def _sentence(fault: Any, where: str, parent: Any) -> str:
    if fault["type"] == "extra_forbidden":
        known = _fields_of(parent)
        near = difflib.get_close_matches(where.rsplit(".", 1)[-1], known, n=1)
        return f"{where}: no such field" + (
            f", do you mean {near[0]}?" if near else f"; the fields are {', '.join(known)}"
        )
    if fault["type"] == "missing":
        return f"{where}: required and not given"
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = fault["ctx"]["discriminator"].strip("'")
        if fault["type"] == "union_tag_not_found":
            return f"{where}.{tag}: required and not given"
        expected = [value.strip(" '") for value in fault["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(fault["ctx"]["tag"], expected, n=1)
        meant = f", do you mean {near[0]}?" if near else ""
        return f"{where}.{tag}: {fault['ctx']['tag']} is none of {', '.join(expected)}{meant}"
    message = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    if isinstance(fault["input"], Mapping) and where:
        names_field = message.partition(":")[0].partition(".")[0] in fault["input"]
        return f"{where}.{message}" if names_field else f"{where}: {message}"
    if isinstance(fault.get("ctx", {}).get("error"), CredentialsInURL):
        return f"{where}: {message}"
    return message if not where else f"{where}: {message} (given: {fault['input']!r})"


def _fields_of(annotation: Any) -> list[str]:
    models = [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, unions and Annotated unwrapped."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for alternative in typing.get_args(annotation) for member in _members(alternative)]
    return [annotation]


def _descend(annotation: Any, part: Any) -> tuple[Any, bool]:
    """The annotation one step deeper, and whether the step was a discriminator's value instead of a key."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            if part in member.model_fields:
                return member.model_fields[part].annotation, False
            tags = (member.model_fields[tag].annotation for tag in TAGS if tag in member.model_fields)
            if any(part in typing.get_args(tag) for tag in tags):
                return member, True
        elif typing.get_origin(member) in (tuple, list) and isinstance(part, int):
            return typing.get_args(member)[0], False
        elif typing.get_origin(member) is dict:
            return typing.get_args(member)[1], False
    return None, False
