"""The base of every section of a config, the paths and URLs in it, and YAML 1.2 in and out.

A section stands beside the code that it configures; `mcir.config` assembles them. Its attribute docstrings are the
manual (`mcir config schema`)."""

import io
import os
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from mcir.errors import UserError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
_SECRET = re.compile(r"(^|[-_])(signature|sig|token|credential|password|secret|key)$", re.IGNORECASE)
TAGS = ("name", "format")
"""The fields that select one of several kinds of section."""


class Section(BaseModel):
    """Frozen, and every key that it does not know is an error."""

    # built at first use, within the whole that uses it: a twentieth of the time that a command takes to start
    model_config = ConfigDict(
        allow_inf_nan=False, defer_build=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class CredentialsInURL(ValueError):
    """Its message repeats none of them."""


def is_url(place: str) -> bool:
    return _SCHEME.match(place) is not None


def require_no_secret(url: str) -> None:
    """CredentialsInURL for a password, a token or a signature in a URL."""
    if not is_url(url):
        return
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    named = [name for name, _ in parse_qsl(parts.query) if _SECRET.search(name)]
    if (at and (":" in user or parts.scheme in ("http", "https", "s3", "gs"))) or named:
        what = f"{named[0]}=…" if named else f"…@{host}"
        raise CredentialsInURL(
            f"the URL holds credentials ({parts.scheme}://{what}), which records would repeat: leave them out, they "
            "are taken from the environment (AWS_ACCESS_KEY_ID, HF_TOKEN, …)"
        )


def expand(path: str) -> str:
    """`~` at its beginning and `${NAME}` anywhere in a path filled in. ValueError for a variable that is not set and
    for a URL with credentials, which every record of the config would repeat."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    filled = re.sub(r"\$\{(\w+)\}", value, path)
    require_no_secret(filled)
    try:
        return str(Path(filled).expanduser()) if filled.startswith("~") else filled
    except RuntimeError as error:
        raise ValueError(str(error)) from None


PathText = Annotated[str, AfterValidator(expand)]
"""A path, or a pattern of paths, as the user writes it."""


def parse_yaml(text: str, where: str) -> Any:
    """YAML 1.2; UserError with the place (`where`, line, column) of a mistake."""
    try:
        return _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place}: {(error.problem or error.context or 'not YAML').strip()}") from None


def to_yaml(values: Any) -> str:
    """Plain values as text that `parse_yaml` reads back equal, keys in their order."""
    text = io.StringIO()
    _yaml().dump(values, text)
    return text.getvalue()


def to_line(value: Any) -> str:
    """A plain value as one line of YAML in the flow style, `{name: edsr, scale: 2}`."""
    text, yaml = io.StringIO(), _yaml()
    yaml.default_flow_style, yaml.width = True, 2**31
    yaml.dump(value, text)
    return text.getvalue().removesuffix("...\n").strip()


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: `no` is a string, 1e-4 a number, a duplicate key an error
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml
