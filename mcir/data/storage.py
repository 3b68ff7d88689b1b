"""Places that are no path on this machine: URLs of the Hub, of object stores and of the web, through fsspec.

Invariants: credentials come from the environment or the store's own login; what a network drops is tried again; what
stays lost is one sentence.
"""

import atexit
import logging
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from glob import escape, has_magic
from typing import TYPE_CHECKING, Any, TypeVar

from mcir.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import IterableDataset

log = logging.getLogger(__name__)
T = TypeVar("T")

RowGroups = Callable[[int, int, int], "pa.Table"]
"""(file, row group of it, its length) to its columns, images still encoded."""
READ_AHEAD = {"hf": {"block_size": 2**16}, "gs": {"block_size": 2**16}, "s3": {"default_block_size": 2**16}}
"""Bytes. By default it is 5 MiB, a third of a row group, and 50 MiB of S3."""

PAUSES_S = (1.0, 4.0, 16.0)
"""Before each further attempt; fsspec's file systems try several times by themselves in each."""
PATIENT_S = (*PAUSES_S, *[60.0] * 9)
"""In the middle of a run: some ten minutes."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING = {
    *(
        "aiohttp.ClientError",
        "botocore.HTTPClientError",
        "botocore.ConnectionError",
        "http.HTTPException",
        "httpx.RequestError",
    ),
    *("httpx2.RequestError", "google.RetryError", "gcsfs.HttpError"),
}
"""Errors of a network that are no OSError."""


def open_store(url: str) -> tuple[Any, str]:
    """The file system that a URL is in, and the place in it. UserError: no such scheme, or its package is missing."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}; for s3:// pip install 'mcir[storage]'") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


def urls_at(place: str, suffix: str) -> list[str]:
    """The files of one suffix at a folder (any depth), a file or a pattern of a store, as URLs, sorted."""
    store, path = open_store(place)

    def found() -> list[str]:
        if has_magic(path):
            return [name for name in store.glob(path) if name.lower().endswith(suffix)]
        if path.lower().endswith(suffix):
            return [path]
        return [name for name in store.find(path) if name.lower().endswith(suffix)]

    names = steadily(found, place)
    return [store.unstrip_protocol(name) for name in sorted(names)]


def is_of_the_network(error: Exception) -> bool:
    """Whether an error of any file system is worth another attempt; Arrow's of a damaged file, an OSError without a
    number, is not."""
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if type(error) is OSError:
        return error.errno is not None
    return bool(names & _PASSING) or (isinstance(error, OSError) and not isinstance(error, _FINAL))


def retried(work: Callable[[], T], place: str, pauses_s: Sequence[float]) -> T:
    """What `work` gives, tried again after each pause where the network or the store fails."""
    for pause in pauses_s:
        try:
            return work()
        except Exception as error:
            if not is_of_the_network(error):
                raise
            log.warning("%s: %s; trying again in %g s", place, first_line(error), pause)
            time.sleep(pause)
    return work()


def steadily(work: Callable[[], T], place: str, pauses_s: Sequence[float] | None = None) -> T:
    """`retried`, by default after PAUSES_S. UserError about `place` where it is not there, may not be read or written,
    or fails for good."""
    try:
        return retried(work, place, PAUSES_S if pauses_s is None else pauses_s)
    except UserError:
        raise
    except Exception as error:
        raise UserError(sentence(place, error)) from error


def sentence(place: str, error: Exception) -> str:
    """What the user is told of a place that failed."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"{place}: is not there"
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return (
            f"{place}: may not be accessed ({said}): credentials are taken from the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, …)"
        )
    if is_of_the_network(error):
        return f"{place}: the network or the store fails ({said}); check the address, or start again later"
    return f"{place}: {said}"


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def row_groups_of_urls(files: list[str], columns: list[str], check_pages: bool) -> RowGroups:
    """Of Parquet files, through Hugging Face `datasets`; `check_pages`: by the checksums of Parquet."""
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar
    from pyarrow.dataset import ParquetFragmentScanOptions

    disable_progress_bar()
    dataset = load_dataset(
        "parquet",
        data_files=[escape(file) for file in files],  # `datasets` takes names for patterns
        split="train",
        streaming=True,
        storage_options=READ_AHEAD,
        columns=columns,
        fragment_scan_options=ParquetFragmentScanOptions(page_checksum_verification=check_pages),
    ).with_format("arrow")  # which leaves the images encoded
    assert dataset.num_shards == len(files)
    return partial(_row_group, dataset)


def _row_group(dataset: "IterableDataset", file: int, index: int, length: int) -> "pa.Table":
    _let_arrow_finish()
    shard = _of_file(dataset, file)
    shard = shard.shard(num_shards=shard.num_shards, index=index)
    # .iter and not __iter__: the latter would divide the row group among DataLoader workers
    (table,) = shard.iter(batch_size=length)
    return table


@lru_cache(maxsize=512)
def _of_file(dataset: "IterableDataset", file: int) -> "IterableDataset":
    """One file of the dataset with a row group a shard. Resharding opens the files: not all of them in all workers."""
    return dataset.shard(num_shards=dataset.num_shards, index=file).reshard()


@lru_cache(maxsize=1)
def _let_arrow_finish() -> None:
    """Arrow's threads let go of Python's files a little after the last row is out. Where Python has ended by then they
    abort the process, or hang it: apache/arrow#34314, #50482."""
    atexit.register(time.sleep, 0.1)
