"""Weights from anywhere: a place as the user writes it becomes a file on this machine.

    hf://owner/repo[/file][@revision]       the Hub, in the Hub's own cache
    https://host/net.pth#sha256=…           the web: with a checksum, so that what is loaded is what was meant
    s3://bucket/net.pth, gs://…             any file system of fsspec; a checksum may be given
    path/to/net.pth                         itself

Invariants: what was taken has a name that stays true (`origin`: the commit or the checksum is in it); what is loaded
is whole and of that name; of several processes on a machine one fetches while the others wait; HF_HUB_OFFLINE keeps the
Hub and the web out.
"""

import hashlib
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mcir.archs.state_dict import ENTRY, PICKLE_SUFFIXES, WEIGHTS_FILE
from mcir.data.storage import open_store, steadily
from mcir.errors import UserError
from mcir.section import is_url, parse_yaml, require_no_secret

EMA_FILE = "ema.safetensors"
Kind = Literal["ema", "target"]

SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
_HUB = re.compile(
    r"hf://(?:models/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<before>refs/(?:convert|pr)/[^/@]+|[^/@]+))?"
    r"(?:/(?P<file>[^@]+))?(?:@(?P<after>.+))?"
)
TIMEOUT_S = 30


@dataclass(frozen=True)
class Fetched:
    path: Path
    """On this machine, with the entry that was named (`net.pth[params]`)."""
    origin: str
    """The place, pinned: `hf://owner/repo/file@COMMIT`, `s3://…#sha256=…`; a path as it was given."""
    chosen: bool = False
    """Whether `kind` chose the file in a folder."""


def fetch(place: str, kind: Kind | None = None) -> Fetched:
    """The file of a place. `kind` chooses in a checkpoint's folder of an object store. UserError: nothing there, not
    reachable, gated, or not what the checksum says."""
    if not is_url(place):
        return Fetched(Path(place), place)
    try:
        require_no_secret(place)
    except ValueError as error:
        raise UserError(f"weights: {error}") from None
    match = ENTRY.fullmatch(place)
    url, entry = (match[1], f"[{match[2]}]") if match else (place, "")
    if url.startswith("hf://"):
        path, pinned = _from_hub(url)
    elif url.startswith(("https://", "http://")):
        path, pinned = _from_web(url)
    else:
        path, pinned = _from_store(url, kind)
    chosen = not url.startswith("hf://") and urlsplit(url).path != urlsplit(pinned).path
    return Fetched(Path(f"{path}{entry}"), pinned + entry, chosen)


def fetch_all(places: Sequence[str], kind: Kind | None = None, accelerator: Accelerator | None = None) -> list[Fetched]:
    """`fetch` of each; with an `accelerator` all processes get what the main one found, also of a branch that moves.
    Collective then. UserError on all processes where the main one cannot fetch."""
    if accelerator is None or not any(map(is_url, places)):
        return [fetch(place, kind) for place in places]
    fetched: list[Fetched] = []
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            fetched = [fetch(place, kind) for place in places]
            told[0] = [(one.origin, one.chosen) for one in fetched]
        except UserError as error:
            told[1] = str(error)
    broadcast_object_list(told)
    if told[1]:
        raise UserError(told[1])
    return fetched or [replace(fetch(origin), chosen=chosen) for origin, chosen in told[0]]


def name_of(place: str) -> str:
    """What results call the weights of a URL: the file's stem, or the folder or repository that holds it."""
    if (match := _HUB.fullmatch(place)) and not match["file"]:
        return match["repo"].partition("/")[2]
    parts = urlsplit(place)
    path = PurePosixPath(parts.netloc + re.sub(r"@[^/]*$", "", parts.path))
    in_folder = path.suffix not in SUFFIXES or path.name in (WEIGHTS_FILE, EMA_FILE)
    return path.stem if not in_folder else (path.parent if path.suffix in SUFFIXES else path).name


def _from_hub(url: str) -> tuple[Path, str]:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match = _HUB.fullmatch(url)
    if match is None or (match["before"] and match["after"]):
        raise UserError(f"{url}: weights on the Hub are written hf://owner/repo[/file][@revision]")
    repo, revision, file = match["repo"], match["before"] or match["after"], match["file"]
    if file and not file.endswith(SUFFIXES):
        file = f"{file.rstrip('/')}/{WEIGHTS_FILE}"
    try:
        try:
            path = hf_hub_download(repo, file or WEIGHTS_FILE, revision=revision)
        except EntryNotFoundError as error:
            if file or isinstance(error, LocalEntryNotFoundError):
                raise
            file = _only_file(repo, revision)
            path = hf_hub_download(repo, file, revision=revision)
    except UserError:
        raise
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{url}: is not in the Hub's cache, and HF_HUB_OFFLINE is set") from error
        raise UserError(
            f"{url}: the Hub ({constants.ENDPOINT}) cannot be reached ({' '.join(str(error.__cause__).split())}), and "
            "the file is not in its cache"
        ) from error
    except EntryNotFoundError as error:
        there = ""
        with suppress(Exception):  # the network may go meanwhile
            there = f"; its weights files: {', '.join(_weights_in(repo, revision)) or 'none'}"
        raise UserError(f"{url}: the repository has no {file}{there}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{url}: the repository has no branch, tag or commit {revision}") from error
    except GatedRepoError as error:
        raise UserError(
            f"{url}: the repository is gated: accept its terms at {constants.ENDPOINT}/{repo} and log in (HF_TOKEN, or "
            "`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{url}: the Hub has no repository {repo}; if it is private, log in (HF_TOKEN, or `hf auth login`)"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}") from error
    except Exception as error:  # of the network and the Hub
        raise UserError(f"{url}: the Hub fails ({' '.join(str(error).split())}); try again later") from error
    name = file or WEIGHTS_FILE
    commit = Path(path).parents[len(PurePosixPath(name).parts) - 1].name
    return Path(path), f"hf://{repo}/{name}@{commit}"


def _weights_in(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    return [name for name in HfApi().list_repo_files(repo, revision=revision) if name.endswith(SUFFIXES)]


def _only_file(repo: str, revision: str | None) -> str:
    found = _weights_in(repo, revision)
    if len(found) != 1:
        there = f"several weights files: {', '.join(found)}; name one" if found else "no weights file"
        raise UserError(f"hf://{repo}: holds {there}, hf://owner/repo/file")
    return found[0]


def _split_checksum(url: str) -> tuple[str, str | None]:
    address, mark, fragment = url.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if mark and not match:
        raise UserError(f"{url}: a checksum is written #sha256= and 64 hexadecimal digits, as `sha256sum FILE` prints")
    return address, match[1].lower() if match else None


def _from_web(url: str) -> tuple[Path, str]:
    address, sha256 = _split_checksum(url)
    if sha256 is None:
        raise UserError(
            f"{url}: add the file's checksum, {url}#sha256=… (64 hexadecimal digits, as `sha256sum FILE` prints), so "
            "that what is loaded is what was meant"
        )
    return _cached(address, sha256, _download), url


def _from_store(url: str, kind: Kind | None) -> tuple[Path, str]:
    address, sha256 = _split_checksum(url)
    if sha256 is not None:
        return _cached(address, sha256, _get), url
    store, place = open_store(address)
    if not address.endswith(SUFFIXES):
        address = f"{address.rstrip('/')}/{steadily(lambda: _choice(store, place, kind), address)}"
        store, place = open_store(address)
    version = steadily(lambda: store.ukey(place), address)
    known = _cache() / "refs" / hashlib.sha256(f"{address} {version}".encode()).hexdigest()
    sha256 = known.read_text() if known.is_file() else None
    path = _cached(address, sha256, _get)
    known.parent.mkdir(parents=True, exist_ok=True)
    _replace_text(known, path.parent.name)
    return path, f"{address}#sha256={path.parent.name}"


def _choice(store: Any, folder: str, kind: Kind | None) -> str:
    """Which file of a checkpoint's folder, by the rule of `choose_file`."""
    names = {PurePosixPath(name).name for name in store.ls(folder, detail=False)}
    if kind is None and EMA_FILE in names and WEIGHTS_FILE in names and "config.yaml" in names:
        config = parse_yaml(store.cat_file(f"{folder}/config.yaml").decode(), f"{folder}/config.yaml")
        kind = (config.get("validation") or {}).get("weights")
    chosen = WEIGHTS_FILE if kind == "target" or (kind is None and EMA_FILE not in names) else EMA_FILE
    if chosen not in names:
        raise UserError(f"{folder}: holds no {chosen}; name a weights file, or the folder of a checkpoint or an export")
    return chosen


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "mcir"


def _cached(url: str, sha256: str | None, get: Any) -> Path:
    """The file of a URL, at SHA256/NAME of the cache: fetched by `get(url, partial file)` if it is not there, checked,
    and only then given that name."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    name = PurePosixPath(urlsplit(url).path).name
    if not name.endswith(SUFFIXES):
        raise UserError(f"{url}: weights are read from {', '.join(SUFFIXES)}, and the address ends otherwise")
    cache = _cache()
    if sha256 is not None and (there := cache / sha256 / name).is_file():
        return there
    key = hashlib.sha256(url.encode()).hexdigest()
    (cache / "partial").mkdir(parents=True, exist_ok=True)
    partial = cache / "partial" / key
    with WeakFileLock(partial.with_suffix(".lock")):
        if sha256 is not None and (there := cache / sha256 / name).is_file():  # another process was first
            return there
        if constants.HF_HUB_OFFLINE and get is _download:
            raise UserError(f"{url}: is not in the cache ({cache}), and HF_HUB_OFFLINE is set")
        partial.unlink(missing_ok=True)
        try:
            steadily(lambda: get(url, partial), url)
            with partial.open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
            if sha256 not in (found, None):
                raise UserError(f"{url}: its SHA-256 is {found}, not {sha256}: another file, or a damaged one")
            there = cache / found / name
            there.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, there)
        finally:
            partial.unlink(missing_ok=True)
    return there


def _get(url: str, partial: Path) -> None:
    store, place = open_store(url)
    store.get_file(place, str(partial))
    if (size := store.info(place)["size"]) != partial.stat().st_size:
        raise ConnectionError(f"{partial.stat().st_size} of {size} bytes came")


def _download(url: str, partial: Path) -> None:
    """Append to the partial file what it lacks. UserError: the server does not have it."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            goes_on = answer.status == 206
            with partial.open("ab" if goes_on else "wb") as file:
                _copy(answer, file)
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 429):
            raise UserError(f"{url}: the server answers {error.code} {error.reason}") from error
        raise


def _copy(answer: Any, file: BinaryIO) -> None:
    expected, before = answer.headers.get("Content-Length"), file.tell()
    shutil.copyfileobj(answer, file, 2**20)
    came = file.tell() - before
    if expected is not None and came != int(expected):
        raise ConnectionError(f"{came} of {expected} bytes came")


def _replace_text(file: Path, text: str) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, file)
