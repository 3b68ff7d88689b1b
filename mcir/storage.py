"""Places that are no path on this machine: URLs of the Hub, of object stores and of the web, through fsspec.

Invariants: credentials come from the environment or the store's own login, and are refused in a URL, which configs,
records and cards repeat; what a network drops is tried again; what stays lost is one sentence.
"""

import logging
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from mcir.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES_S = (1.0, 4.0, 16.0)
"""Before each further attempt; fsspec's file systems try several times by themselves in each."""
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
_SECRET = re.compile(r"(^|[-_])(signature|sig|token|credential|password|secret|key)$", re.IGNORECASE)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, UserError)


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


def open_store(url: str) -> tuple[Any, str]:
    """The file system that a URL is in, and the place in it. UserError: no such scheme, or its package is missing."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}; for s3:// pip install 'mcir[storage]'") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


def steadily(work: Callable[[], T], place: str) -> T:
    """What `work` gives, tried again after a pause where the network or the store fails. UserError about `place` where
    it is not there, may not be read or written, or fails for good."""
    for pause in (*PAUSES_S, None):
        try:
            return work()
        except UserError:
            raise
        except Exception as error:  # of any file system: OSError, botocore's, aiohttp's, httpx's ...
            if isinstance(error, _FINAL) or "Credential" in type(error).__name__ or pause is None:
                raise UserError(sentence(place, error)) from error
            log.warning("%s: %s; trying again in %g s", place, first_line(error), pause)
            time.sleep(pause)
    raise AssertionError


def sentence(place: str, error: Exception) -> str:
    """What the user is told of a place that failed."""
    if isinstance(error, FileNotFoundError):
        return f"{place}: is not there"
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return (
            f"{place}: may not be accessed ({first_line(error)}): credentials are taken from the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, …)"
        )
    return f"{place}: the network or the store fails ({first_line(error)}); check the address, or start again later"


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
