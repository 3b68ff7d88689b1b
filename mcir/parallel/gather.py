"""Spread tensors made whole, a bucket at a time: one collective serves all tensors of a bucket, and the next bucket's
is on its way while the caller is busy with the last one's.

`shards` says of each tensor what this rank holds of it (`Slot`, `Fragment`, or the whole `Tensor`); nothing here knows
the strategies.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

BUCKET_BYTES = 16 * 2**20
"""Of whole tensors in a collective. Gathering adds two buckets, this one and the next, to what a process holds."""


@dataclass(frozen=True)
class Slot:
    """One of equally long flat pieces, in the order of the group's ranks; beyond the tensor's end is padding."""

    local: Tensor
    """Flat; a last piece may be shorter than `size`."""
    size: int
    shape: torch.Size
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Fragment:
    """A flat piece from `start` on, of any length (or none); the group's pieces cover the tensor once."""

    local: Tensor
    start: int
    shape: torch.Size
    group: dist.ProcessGroup | None = None


Piece = Tensor | Slot | Fragment
Named = list[tuple[str, Tensor]]


def gathered(pieces: Iterable[tuple[str, Piece]]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 tensor), in order. Collective: all ranks give the same names. Do not keep the tensors: together
    they are as large as the network."""
    waiting: Callable[[], Named] | None = None
    for bucket in _buckets(pieces):
        begun = _begin(bucket)
        if waiting is not None:
            yield from waiting()
        waiting = begun
    if waiting is not None:
        yield from waiting()


def _buckets(pieces: Iterable[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    """Pieces of one kind and group together, as many as fit."""
    bucket: list[tuple[str, Piece]] = []
    kind, num_bytes = None, 0
    for name, piece in pieces:
        this = type(piece), getattr(piece, "group", None)
        if bucket and (this != kind or num_bytes >= BUCKET_BYTES):
            yield bucket
            bucket, num_bytes = [], 0
        kind = this
        bucket.append((name, piece))
        num_bytes += 4 * piece.shape.numel()
    if bucket:
        yield bucket


def _begin(bucket: list[tuple[str, Piece]]) -> Callable[[], Named]:
    """Start the bucket's collective; what is returned waits for it."""
    names, pieces = zip(*bucket, strict=True)
    if isinstance(pieces[0], Slot):
        return _begin_slots(names, pieces)
    if isinstance(pieces[0], Fragment):
        return _begin_fragments(names, pieces)
    return lambda: [(name, whole.detach().float()) for name, whole in bucket]  # type: ignore[union-attr]


def _begin_slots(names: tuple[str, ...], pieces: tuple[Any, ...]) -> Callable[[], Named]:
    group = pieces[0].group
    num_ranks, total = dist.get_world_size(group), sum(piece.size for piece in pieces)
    own = pieces[0].local.new_zeros(total, dtype=torch.float32)
    for piece, place in zip(pieces, own.split([piece.size for piece in pieces]), strict=True):
        place[: piece.local.numel()] = piece.local
    all_own = own.new_empty(num_ranks * total)
    work = dist.all_gather_into_tensor(all_own, own, group=group, async_op=True)
    assert work is not None

    def finish() -> Named:
        work.wait()
        columns = all_own.view(num_ranks, total).split([piece.size for piece in pieces], dim=1)
        return [
            (name, column.reshape(-1)[: piece.shape.numel()].view(piece.shape))
            for name, piece, column in zip(names, pieces, columns, strict=True)
        ]

    return finish


def _begin_fragments(names: tuple[str, ...], pieces: tuple[Any, ...]) -> Callable[[], Named]:
    sizes = [piece.shape.numel() for piece in pieces]
    flat = pieces[0].local.new_zeros(sum(sizes), dtype=torch.float32)
    for piece, place in zip(pieces, flat.split(sizes), strict=True):
        place[piece.start : piece.start + piece.local.numel()] = piece.local
    work = dist.all_reduce(flat, group=pieces[0].group, async_op=True)  # the others' zeros change no bit
    assert work is not None

    def finish() -> Named:
        work.wait()
        parts = flat.split(sizes)
        return [(name, part.view(piece.shape)) for name, piece, part in zip(names, pieces, parts, strict=True)]

    return finish
