"""Restores a batch as a network's official test does, in bounded memory.

The Descriptor says how: pad to the network's multiple, tile what does not fit or what has only one size, blend, crop.
Invariants: the result is scale times the input, whatever the sizes of image, tile and padding; whatever pads, tiles or
averages leaves an identity network the identity, to the bit; a network whose receptive radius is at most a quarter of
the overlap gives the same tiled as whole. Networks that look at the whole image (means over it, attention to all of it)
do not: for them a tile is a change of the network, and "auto" tiles only after trying one image at a time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from mcir.archs.base import Descriptor
from mcir.errors import UserError
from mcir.restoration.memory import fits

TILES_AT_ONCE = 16  # of a network with one size, in one forward: small tiles alone leave a GPU idle
SMALLEST_TILE = 32  # where "auto" gives up


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 without TF32, whose 10 bits would move the numbers of published tables, and without trying cuDNN's
    algorithms for every size of image."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    benchmark = torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = conv, benchmark


@full_precision()
@torch.no_grad()  # not inference_mode: what a network caches in forward must stay usable in training
def infer(
    net: nn.Module,
    descriptor: Descriptor,
    degraded: Tensor,
    tile: int | Literal["auto"] | None = None,
    overlap: int | None = None,
    ensemble: bool = False,
) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W), not clamped, dtype and device of `degraded`.

    `net` must be in eval mode and on that device. `tile`: side of the square tiles in input pixels, a multiple of the
    network's size multiple; None: the whole image; "auto": the whole batch, on out-of-memory fewer images at once, then
    smaller tiles; what would not fit into a CPU's memory is not tried (memory.py). A network with a fixed size is
    always tiled by it, as its official test does. `overlap` of neighbouring tiles in input pixels, at most half a tile:
    "auto" takes none smaller than twice of it; by default the network's own, else 32, or half a tile. `ensemble`: the
    mean over the 8 turns and mirrorings of the image ("+" in super-resolution tables), 8 times as long.

    "auto" decides on each process alone, so it is not for a network whose forward is collective (sharded weights).
    Raises UserError for a tile or overlap that the network cannot take, ValueError for another shape or dtype.
    """
    assert not net.training, "call net.eval() first"
    if degraded.ndim != 4 or degraded.shape[1] != 3 or 0 in degraded.shape or not degraded.is_floating_point():
        raise ValueError(f"degraded must be floating, (B, 3, H, W), not {degraded.dtype} {tuple(degraded.shape)}.")
    check_tiles(descriptor, tile, overlap)
    failure: Exception | None = None
    for side, num_tiles in attempts(descriptor, degraded.shape, tile, overlap or 0):
        if degraded.device.type == "cpu" and not fits_cpu(net, descriptor, degraded.shape, side, num_tiles):
            failure = MemoryError("not enough memory for this picture")
            continue
        try:
            if ensemble:
                return ensembled(net, descriptor, degraded, side, num_tiles, overlap)
            return restore_padded(net, descriptor, degraded, side, num_tiles, overlap)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # its frames hold the tensors that did not fit
        if degraded.is_cuda:
            torch.cuda.empty_cache()
    assert failure is not None
    raise failure


def fits_cpu(net: nn.Module, descriptor: Descriptor, shape: torch.Size, side: int, num_tiles: int) -> bool:
    """Whether tiles of this side and number, and the picture that they make, fit into the memory there is."""
    height, width = padded_size(descriptor, shape[2], shape[3])
    tiles = math.ceil(height / side) * math.ceil(width / side) * shape[0]
    outputs = 4 * 3 * shape[0] * height * width * descriptor.scale**2  # restored, weights, and a copy to write from
    forward = (min(num_tiles, tiles), 3, min(side, height), min(side, width))
    return fits(net, forward, 3 * outputs)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward failed for want of memory, on any device: only CUDA has an exception for it."""
    phrases = (
        "DefaultCPUAllocator",
        "not enough memory",
        "MPS backend out of memory",
        "CUDA error: out of memory",
        "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
        "unable to find an engine to execute this computation",  # cuDNN without room to work in
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(p in str(error) for p in phrases)


def check_tiles(descriptor: Descriptor, tile: int | str | None, overlap: int | None) -> None:
    """UserError unless the network can be tiled so. Call it before a long run: it needs no image."""
    multiple, fixed = descriptor.size_multiple, descriptor.fixed_size
    if fixed and tile not in (None, "auto", fixed):
        raise UserError(f"tile {tile}: this network takes only tiles of {fixed}; leave tile out.")
    if isinstance(tile, int) and not fixed:
        smallest, _ = padded_size(descriptor, 1, 1)
        if tile < smallest or tile % multiple:
            multiples = f", a multiple of {multiple}" if multiple > 1 else ""
            raise UserError(f"tile {tile}: this network needs tiles of at least {smallest}{multiples}.")
    elif isinstance(tile, str) and tile != "auto":
        raise UserError(f'tile {tile!r}: give a number of pixels or "auto".')
    largest = fixed or (tile if isinstance(tile, int) else None)
    if overlap is not None and (overlap < 0 or (largest and overlap > largest // 2)):
        raise UserError(f"overlap {overlap}: from 0 to half the tile{f', {largest // 2}' if largest else ''}.")


def attempts(
    descriptor: Descriptor, shape: torch.Size, tile: int | Literal["auto"] | None, overlap: int = 0
) -> Iterator[tuple[int, int]]:
    """(side of the tiles, tiles per forward) to try in turn: one, or ever less memory for "auto"."""
    num_images, whole = shape[0], max(padded_size(descriptor, shape[2], shape[3]))
    side = descriptor.fixed_size or (tile if isinstance(tile, int) else whole)
    num_tiles = TILES_AT_ONCE if descriptor.fixed_size else num_images
    yield side, num_tiles
    if tile != "auto":
        return
    while num_tiles > 1:
        num_tiles //= 2
        yield side, num_tiles
    smallest, _ = padded_size(descriptor, *[max(SMALLEST_TILE, 2 * overlap)] * 2)
    while not descriptor.fixed_size and side > smallest:
        side = max(smallest, side // 2 // descriptor.size_multiple * descriptor.size_multiple)
        yield side, 1


def ensembled(
    net: nn.Module, descriptor: Descriptor, degraded: Tensor, side: int, num_tiles: int, overlap: int | None
) -> Tensor:
    """Mean over the dihedral group of the square: restored in 8 poses, turned back (Timofte et al., CVPR 2016)."""
    mean = restore_padded(net, descriptor, degraded, side, num_tiles, overlap)
    for pose in range(1, 8):
        flips = [dim for bit, dim in ((1, 2), (2, 3)) if pose & bit]
        posed = (degraded.mT if pose & 4 else degraded).flip(flips)
        restored = restore_padded(net, descriptor, posed, side, num_tiles, overlap).flip(flips)
        mean = mean.lerp(restored.mT if pose & 4 else restored, 1 / (pose + 1))  # equal stays equal, to the bit
    return mean


def restore_padded(
    net: nn.Module, descriptor: Descriptor, degraded: Tensor, side: int, num_tiles: int, overlap: int | None
) -> Tensor:
    """Pads right and below as the official test does, restores in tiles of at most `side`, crops."""
    height, width = degraded.shape[2:]
    padded_height, padded_width = padded_size(descriptor, height, width)
    for dim, length, target in ((2, height, padded_height), (3, width, padded_width)):
        if target > length:
            degraded = degraded.index_select(dim, mirrored(length, target, descriptor.pad_mode, degraded.device))
    restored = restore_tiled(net, descriptor, degraded, side, num_tiles, overlap)
    return restored[..., : descriptor.scale * height, : descriptor.scale * width]


def padded_size(descriptor: Descriptor, height: int, width: int) -> tuple[int, int]:
    """(height, width) that the network sees of an image of this size."""
    multiple = descriptor.size_multiple
    extra = 1 if descriptor.pad_mode == "flip" and multiple > 1 else 0
    least = max(descriptor.min_size, descriptor.fixed_size or 1)
    height, width = (
        multiple * max(math.ceil(side / multiple) if not extra else side // multiple + 1, math.ceil(least / multiple))
        for side in (height, width)
    )
    return (max(height, width),) * 2 if descriptor.square else (height, width)


def mirrored(length: int, target: int, mode: Literal["reflect", "flip"], device: torch.device) -> Tensor:
    """Indices that continue a line of `length` to `target` by mirrors, again and again if it is much shorter.

    `reflect` mirrors at the last pixel (a b c b a), `flip` behind it (a b c c b a).
    """
    index = torch.arange(target, device=device)
    if mode == "flip":
        index = index % (2 * length)
        return torch.minimum(index, 2 * length - 1 - index)
    period = max(1, 2 * length - 2)
    index = index % period
    return torch.minimum(index, period - index)


def restore_tiled(
    net: nn.Module, descriptor: Descriptor, image: Tensor, side: int, num_tiles: int, overlap: int | None
) -> Tensor:
    """Tiles of at most `side`, `num_tiles` in one forward, merged by a running weighted mean: equal stays equal."""
    num_images, channels, height, width = image.shape
    tile_height, tile_width = min(side, height), min(side, width)
    if overlap is None:
        overlap = min(descriptor.tile_overlap or 32, side // 2)
    places = [
        (b, top, left)
        for top in tile_starts(height, side, overlap)
        for left in tile_starts(width, side, overlap)
        for b in range(num_images)
    ]
    if len(places) == num_images <= num_tiles:
        return forward(net, descriptor, image)

    scale = descriptor.scale
    restored = image.new_zeros(num_images, channels, scale * height, scale * width)
    total = image.new_zeros(num_images, scale * height, scale * width, dtype=torch.float32)
    if descriptor.fixed_size:
        closeness = centre_weights(scale * tile_height, scale * tile_width, image.device)
    for first in range(0, len(places), num_tiles):
        group = places[first : first + num_tiles]
        tiles = torch.cat([image[b : b + 1, :, y : y + tile_height, x : x + tile_width] for b, y, x in group])
        for (b, y, x), tile in zip(group, forward(net, descriptor, tiles), strict=True):
            if descriptor.fixed_size:
                weight = closeness
            else:
                rows = ramp(scale * tile_height, scale * overlap, y > 0, y + tile_height < height, image.device)
                cols = ramp(scale * tile_width, scale * overlap, x > 0, x + tile_width < width, image.device)
                weight = rows[:, None] * cols
            window = (slice(scale * y, scale * (y + tile_height)), slice(scale * x, scale * (x + tile_width)))
            seen = total[b][window].add_(weight)
            share = (weight / seen).nan_to_num_(0)  # 0 / 0: nothing there yet
            restored[b][:, *window].lerp_(tile, share.to(tile.dtype))
    return restored


def forward(net: nn.Module, descriptor: Descriptor, image: Tensor) -> Tensor:
    """The network's output in the dtype of its input; ValueError unless it is `scale` times as large."""
    restored = net(image)
    if not isinstance(restored, Tensor):
        raise UserError(
            f"the network returns {type(restored).__name__} of {len(restored)} instead of an image: say which of a "
            "list of images is the result (arch.result: first or last), or have it return the image alone"
        )
    expected = (*image.shape[:2], *(descriptor.scale * side for side in image.shape[2:]))
    if restored.shape != expected:
        raise ValueError(f"The network made {tuple(restored.shape)}, but its descriptor promises {expected}.")
    return restored.to(image.dtype)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of a line begin: every `tile - overlap`, the last moved back to end with the line."""
    return [*range(0, length - tile, tile - overlap), length - tile] if length > tile else [0]


def ramp(length: int, overlap: int, at_start: bool, at_end: bool, device: torch.device) -> Tensor:
    """Weights of a tile along one axis: 1, but 0 in the outer quarter of an overlap and linear in its middle half."""
    weights = torch.ones(length, device=device)
    if overlap:
        margin = overlap // 4
        rise = ((torch.arange(length, device=device) + 0.5 - margin) / (overlap - 2 * margin)).clamp(0, 1)
        if at_start:
            weights = torch.minimum(weights, rise)
        if at_end:
            weights = torch.minimum(weights, rise.flip(0))
    return weights


def centre_weights(height: int, width: int, device: torch.device) -> Tensor:
    """IDT's merging: 1 / sqrt(d^2 + 1e-3), d the distance to pixel (height / 2, width / 2). IDT, test_full_size.py."""
    rows = torch.arange(height, device=device) - height / 2
    cols = torch.arange(width, device=device) - width / 2
    return (rows.square()[:, None] + cols.square() + 1e-3).rsqrt()
