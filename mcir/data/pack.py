"""Image folders to Parquet shards with the columns `clean`, `degraded` and `key`, and further images where the samples
have some: the one format every run streams.

Invariants: what a shard holds is a function of the samples and the options alone, so any number of processes, and a
pack that was killed and started again, write the same bytes. A shard appears under its name only when it is whole
(written beside it, synced, renamed); the dataset card, which lists the checksums, comes last. One pack at a time writes
into a folder.

Every image is decoded once, before the first shard is written, into a spool folder inside the output (spool.py; as
large as the crops, removed at the end): the crops of one image go to many shards, and all bad images are named in one
go. Once they are mended or removed, the same command goes on with what is done. Rows are shuffled before they are cut
into shards.
"""

import errno
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mcir.data.card import checksums, dataset_card, file_sha256
from mcir.data.options import Options
from mcir.data.pairs import Pair, Pairs
from mcir.data.parquet import CHECKSUMS
from mcir.data.rows import Row, checksum
from mcir.data.spool import measure, schema, spool, spool_name, spooled_row, write
from mcir.errors import UserError

log = logging.getLogger(__name__)

ROW_GROUP_BYTES = 16 * 2**20
"""A row group ends with the row that passes this: what a reader holds in memory at once, and its unit of work. Opening
one costs about 2 ms where `datasets` does it, a tenth of the time of decoding the JPEGs in 4 MiB."""
_ALL_BAD = 100
"""So many bad samples before the first good one are no accident: the rest is not looked at."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPOOL = ".spool"
_STATE = ".pack.json"
_LOCK = ".pack.lock"

_Place = tuple[Path, int, Pair]
"""A row: the spool file of its sample, its place in it, and the sample."""


def pack(pairs: Pairs, output: Path, options: Options, num_workers: int = 1) -> list[Path]:
    """Write `pairs` as shards and a README.md (dataset card) into the folder `output`; the shards in order.

    A pack of the same samples and options that was interrupted, or had bad samples, is continued, and of a finished one
    the shards that are missing or damaged are written again. `num_workers` processes share the work (0 or 1: this one
    alone). Raises UserError: bad or unequal images (files named), something else in `output`, or another pack at work.
    """
    options.check(pairs)
    if not pairs.samples:
        raise UserError("there is nothing to pack")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be made ({error.strerror}): choose another folder") from error
    spools = [output / _SPOOL / spool_name(pair, pairs, options) for pair in pairs.samples]
    state = _state(pairs, options)
    with _room_asked_for(output), _alone(output):
        done = _claim(output, state, any(file.exists() for file in spools))
        for name, sha256 in done.items():
            if (output / name).exists() and file_sha256(output / name) != sha256:
                (output / name).unlink()
        if not done or not all((output / name).exists() for name in done):
            sizes = _look(spools, pairs, options, num_workers)
            done = _write_shards(spools, sizes, pairs, output, options, num_workers)
            write(output / _STATE, json.dumps(state | {"shards": done}, indent=1).encode())
        shutil.rmtree(output / _SPOOL, ignore_errors=True)
    return [output / name for name in done]


@contextmanager
def _room_asked_for(output: Path) -> Iterator[None]:
    """UserError where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(f"{output}: {error.strerror}; make room, and the same command goes on") from error


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the folder until the end, or of this process. UserError where another pack holds it, or other files lie in
    it."""
    if not (output / _STATE).exists() and any(
        not (file.name == _LOCK or file.match(f"{_STATE}.*.part")) for file in output.iterdir()
    ):
        raise UserError(f"{output} is not empty; choose another folder")
    with (output / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `mcir data pack` writes into {output}; wait, or choose another folder") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): see that one pack alone writes into it", output, error.strerror)
        yield


def _look(spools: list[Path], pairs: Pairs, options: Options, num_workers: int) -> list[tuple[int, int]]:
    """(rows, bytes) of each sample, spooled where it is not yet. UserError with all that are bad."""
    spools[0].parent.mkdir(exist_ok=True)
    lean = replace(pairs, samples=())  # what every task needs; the samples themselves are many
    samples = list(zip(spools, pairs.samples, strict=True))
    todo = [partial(spool, file, pair, lean, options) for file, pair in samples if not _is_whole(file)]
    bad = _run(todo, num_workers, "looking")
    if bad:
        named = "; ".join(map(str, bad[:20])) + f"; and {len(bad) - 20} more" * (len(bad) > 20)
        raise UserError(
            f"{len(bad)} of {len(spools)} samples cannot be packed: {named}; mend or remove them, and the same command "
            "goes on"
        )
    return [measure(file) for file in spools]


def _is_whole(file: Path) -> bool:
    try:
        measure(file)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _write_shards(
    spools: list[Path],
    sizes: list[tuple[int, int]],
    pairs: Pairs,
    output: Path,
    options: Options,
    num_workers: int,
) -> dict[str, str]:
    """The names and SHA-256 of all shards, of which those are written that are not there."""
    rows: list[_Place] = [
        (file, row, pair)
        for file, pair, (num_rows, _) in zip(spools, pairs.samples, sizes, strict=True)
        for row in range(num_rows)
    ]
    num_shards = options.num_shards or -(-sum(num_bytes for _, num_bytes in sizes) // options.shard_bytes)
    if num_shards > len(rows):
        raise UserError(f"{num_shards} shards for {len(rows)} rows: lower num_shards or raise shard_bytes")
    order = range(len(rows)) if options.seed is None else np.random.default_rng(options.seed).permutation(len(rows))
    columns, lean = schema(options.columns(pairs)), replace(pairs, samples=())
    shards = [output / f"{options.split}-{shard:05}-of-{num_shards:05}.parquet" for shard in range(num_shards)]
    tasks = []
    for shard, path in enumerate(shards):
        part = order[len(rows) * shard // num_shards : len(rows) * (shard + 1) // num_shards]
        if not path.exists():
            tasks.append(partial(_write_shard, path, [rows[i] for i in part], columns, lean))
    if failed := _run(tasks, num_workers, "packing"):
        raise failed[0]
    card = dataset_card(shards, pairs, options)
    write(output / "README.md", card.encode())
    return {name: sha256 for name, (_, _, sha256) in checksums(card).items()}


def _state(pairs: Pairs, options: Options) -> dict[str, Any]:
    digest = hashlib.sha256()
    for pair in pairs.samples:
        seen = [(file.name, file.stat()) for file in pair.files]
        digest.update(repr((pair.key, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in seen])).encode())
    return {"samples": digest.hexdigest(), "options": repr((pairs.scale, pairs.centre_crop, *pairs.columns, options))}


def _claim(output: Path, state: dict[str, Any], shared: bool) -> dict[str, str]:
    """Make sure that what lies in `output` is this pack, begun earlier, and clear what a kill left half written.

    `shared`: some of its samples are in the spool, so that others may have been mended or removed since. The names and
    SHA-256 of its shards where it was complete.
    """
    path = output / _STATE
    if not path.exists():
        write(path, json.dumps(state, indent=1).encode())
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove {output}, or choose another folder") from error
    done: dict[str, str] = before.get("shards", {})
    if before["options"] != state["options"]:
        raise UserError(f"{output} holds a pack with other options; choose another folder, or remove it")
    if before["samples"] != state["samples"]:
        if done or not shared:
            raise UserError(
                f"{output} holds a pack of other images, or they were changed since; choose another folder, or "
                "remove it"
            )
        for shard in output.glob("*-of-*.parquet"):  # of the samples of before
            shard.unlink()
        write(path, json.dumps(state, indent=1).encode())
    for left_over in output.rglob("*.part"):
        left_over.unlink()
    return done


def _run(tasks: Sequence[Callable[[], None]], num_workers: int, what: str) -> list[UserError]:
    """Every task, in this process or several, with a progress bar; what the user should know of those that failed."""
    failed: list[UserError] = []
    done = 0

    def finish(result: Callable[[], None]) -> bool:
        """Whether to go on."""
        nonlocal done
        try:
            result()
        except UserError as error:
            failed.append(error)
        done += 1
        progress.advance(bar)
        return len(failed) < max(done, _ALL_BAD)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=len(tasks))
        if num_workers <= 1 or len(tasks) <= 1:
            all(map(finish, tasks))
            return failed
        server = multiprocessing.get_context("forkserver")  # importing torch once for all; fork alone is unsafe
        server.set_forkserver_preload(["mcir.data.pack"])
        with ProcessPoolExecutor(num_workers, server, initializer=_end_with_parent) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                if not all(finish(future.result) for future in as_completed(futures)):
                    pool.shutdown(wait=False, cancel_futures=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failed


def _end_with_parent() -> None:
    """A pool's workers outlive a killed parent and wait for ever: watch it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(path: Path, rows: Iterable[_Place], columns: pa.Schema, pairs: Pairs) -> None:
    def save(part: Path) -> None:
        # Images do not compress further; checksums find what a disk or a copy has changed.
        with pq.ParquetWriter(
            part, columns, compression="none", use_dictionary=False, write_statistics=["key"], write_page_checksum=True
        ) as writer:
            checksums = []
            for group in _row_groups(rows, pairs):
                writer.write_table(pa.Table.from_pylist(group, columns))
                checksums.append(checksum(map(_undecoded, group)))
            writer.add_key_value_metadata({CHECKSUMS: json.dumps(checksums)})

    write(path, save)


def _row_groups(rows: Iterable[_Place], pairs: Pairs) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for place in rows:
        try:
            row = spooled_row(*place, pairs)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
        group.append(row)
        size += sum(len(row[name]["bytes"]) for name in row if name != "key")
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _undecoded(row: dict[str, Any]) -> Row:
    return Row(row["key"], row["clean"]["bytes"], row["degraded"]["bytes"] if "degraded" in row else None, where="")
