"""Whether a forward pass fits into the memory of a CPU, asked before it is made: where a GPU raises an error, Linux
ends the process.

What the pass needs is counted on the meta device: its operations on sizes alone, and the most that they hold at once.
What there is, is the machine's or, where it is less, that of the control group (a container, a Slurm job).
"""

import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORKSPACE = 1.5
"""Of the counted bytes: kernels convert layouts and keep a copy of what they work on."""
KEPT_FREE = 0.1
"""Share of the memory there is, for everything else."""
ANY_NETWORK = 2**16
"""Bytes that no network needs more of for an input pixel: below it nothing is counted."""


def fits(net: nn.Module, shape: tuple[int, ...], others: int) -> bool:
    """Whether a forward of `shape`, (B, 3, H, W), fits beside `others` bytes. True where it cannot be told."""
    available = available_bytes()
    if available is None or others + ANY_NETWORK * shape[0] * shape[2] * shape[3] < available:
        return True
    return others + WORKSPACE * needed_bytes(net, shape) < (1 - KEPT_FREE) * available


def needed_bytes(net: nn.Module, shape: tuple[int, ...]) -> int:
    """The most bytes that the tensors of a forward hold at once, without the weights."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    with torch.no_grad():
        try:
            weights = {n: t.to("meta") for n, t in [*net.named_parameters(), *net.named_buffers()]}
            with _Held() as held:
                functional_call(net, weights, torch.empty(shape, device="meta"))
            return held.most
        except Exception:  # it looks at values: its need for a small picture, by the number of pixels
            side = min(64, *shape[2:])
            with _Held() as held:
                net(torch.zeros(1, 3, side, side, device=device))
            return held.most * shape[0] * shape[2] * shape[3] // side**2


class _Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is on, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in given:
                    self._count(storage._cdata, storage, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def _count(self, key: int, storage: Any, num_bytes: int) -> None:
        def freed(_: Any) -> None:
            self.now -= num_bytes
            self._known.pop(key, None)

        self.now += num_bytes
        self._known[key] = weakref.ref(storage, freed)


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What this process can still take; None where the system does not say."""
    try:
        lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        found = {name.rstrip(":"): 1024 * int(value) for name, value, *_ in lines}
        least = found["MemAvailable"]
    except (OSError, ValueError, KeyError):
        return None
    for folder, limit, used in _groups(proc, cgroups):
        try:
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            reclaimable = int(cached.get("inactive_file", cached.get("total_inactive_file", 0)))
            room = int((folder / limit).read_text()) - int((folder / used).read_text()) + reclaimable
            least = min(least, room)
        except (OSError, ValueError):
            continue  # no limit ("max"), or no such group from here
    return max(0, least)


def limits(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that the control groups of this process (a container, a Slurm job) may take, where they are limited."""
    found = []
    for folder, limit, _ in _groups(proc, cgroups):
        with suppress(OSError, ValueError):  # no such group from here, or no limit ("max")
            found.append(int((folder / limit).read_text()))
    return found


def _groups(proc: Path, cgroups: Path) -> list[tuple[Path, str, str]]:
    """(folder, file of the limit, file of the use) of this process's control groups, up to the root."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        groups += [(root.joinpath(*parts[:depth]), *files) for depth in range(len(parts), -1, -1)]
    return groups
