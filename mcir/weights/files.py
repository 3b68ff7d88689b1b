"""Weights in and out of files: what other repositories publish, and our own self-describing safetensors.

Invariants: a tensor is loaded only where name and shape agree, and
every name that is not is in the report; what we write is fp32 under the official key names, with the network's
description in the metadata, so that a file alone rebuilds its network.
"""

import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mcir import __version__
from mcir.archs import Arch, parse
from mcir.archs.edsr import DIV2K_MEAN
from mcir.archs.state_dict import PARALLEL_PREFIX, locate, read_entry
from mcir.errors import UserError

log = logging.getLogger(__name__)

# Put before every name by training classes (Lightning); some networks really have a child of that name.
HOLDER_PREFIXES = ("", "model.", "net.", "netG.", "net_g.", "generator.", "network.")
# Buffers that the constructor computes from the window and image size: always kept as built.
DERIVED = re.compile(r"(^|\.)(attn_mask|relative_position_index|relative_positions|relative_coords)\w*$")
# What tools and training codes leave among a network's tensors: counts of operations, of averaged models.
LEFT_BEHIND = re.compile(r"(^|\.)(total_ops|total_params|n_averaged)$")
UPSAMPLER = re.compile(r"^(upsample|conv_before_upsample|conv_up\d|conv_hr|conv_last|tail|up)\.")


@dataclass(frozen=True)
class LoadReport:
    """What became of every name of a file and of a network."""

    path: Path
    entry: str
    """Where in the file the weights were: `params_ema`, or "" when the file holds nothing else."""
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    """Names of the network that the file lacks: they keep their fresh values."""
    unexpected: tuple[str, ...]
    """Names of the file that the network lacks, in parts that it has."""
    foreign: tuple[str, ...]
    """Names of the file that are no part of this network (a loss's, another network's, a tool's)."""
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Names of both whose shapes differ (name, shape in the file, shape in the network): the network's are kept."""

    share: float
    """Of the network's values, those that the file fills."""

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        source = f"{self.path}" + (f" [{self.entry}]" if self.entry else "")
        beside = f"; {len(self.foreign)} beside them are of no part of it: {self.foreign[0]} …" if self.foreign else ""
        if self.complete:
            return f"{source}: all {len(self.matched)} tensors loaded{beside}"
        lines = [f"{source}: {len(self.matched)} tensors loaded, {self.share:.1%} of the network's values{beside}"]
        for title, names in (
            ("missing in the file, left as initialised", self.missing),
            ("unexpected in the file, not used", self.unexpected),
            ("of another shape, left as initialised", [f"{n} {list(a)} -> {list(b)}" for n, a, b in self.mismatched]),
        ):
            if names:
                lines.append(f"  {len(names)} {title}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}")
        differing = (*self.missing, *self.unexpected, *(name for name, _, _ in self.mismatched))
        if all(UPSAMPLER.match(name) for name in differing):
            lines.append("  only the upsampler differs: a warm start from another scale")
        return "\n".join(lines)


def _from_edsr_pytorch(tensors: dict[str, Tensor], net: nn.Module, path: Path) -> dict[str, Tensor]:
    """The names of thstkdgus35/EDSR-PyTorch as those of BasicSR; its MeanShift becomes the network's own constant."""
    num_blocks = max(int(name.split(".")[1]) for name in tensors if name.startswith("body."))
    img_range = getattr(net, "img_range", 255.0)
    if (shift := tensors.get("sub_mean.bias")) is not None and not torch.allclose(
        -shift.float(), img_range * torch.tensor(DIV2K_MEAN), rtol=1e-3
    ):
        raise UserError(
            f"{path}: was trained with rgb_range {-shift[0].item() / DIV2K_MEAN[0]:g}; set arch.img_range to that "
            f"(it is {img_range:g})"
        )
    rules = (
        (r"^head\.0\.", "conv_first."),
        (rf"^body\.{num_blocks}\.", "conv_after_body."),
        (r"^body\.(\d+)\.body\.0\.", r"body.\1.conv1."),
        (r"^body\.(\d+)\.body\.2\.", r"body.\1.conv2."),
        (r"^tail\.0\.", "upsample."),
        (r"^tail\.1\.", "conv_last."),
    )
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(("sub_mean.", "add_mean.")):
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
    return renamed


def _aliases(net: nn.Module) -> dict[str, set[str]]:
    """The names of each tensor that modules of the network share, by each of its names."""
    names: dict[int, set[str]] = {}
    for named in (net.named_parameters, net.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), set()).add(name)
    return {name: shared for shared in names.values() if len(shared) > 1 for name in shared}


def load_into(
    net: nn.Module,
    path: str | Path,
    prefer: Literal["params", "ema"] = "params",
    strict: bool = False,
    min_share: float = 0.0,
) -> LoadReport:
    """Load every tensor of the file whose name and shape the network has, and report on all others.

    Buffers that follow from the image and window size (SwinIR's masks and indices) stay as built. EDSR-PyTorch's names
    are translated; names that are no part of the network are left aside. Raises UserError when nothing matches, less
    than `min_share` of the network's values, or, if `strict`, not all on both sides; and when a value is not finite or
    quantised.
    """
    tensors, entry = read_entry(path, prefer)
    file = locate(path)
    own = net.state_dict()
    if "head.0.weight" in tensors and "conv_first.weight" in own and "body.0.conv1.weight" in own:
        tensors = _from_edsr_pytorch(tensors, net, file)

    prefixes = [outer + inner for outer in ("", PARALLEL_PREFIX) for inner in HOLDER_PREFIXES]
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in tensors for name in own))
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    given = {name: tensor for name, tensor in tensors.items() if not DERIVED.search(name)}
    wanted = {name: tensor for name, tensor in own.items() if not DERIVED.search(name)}
    aliases = _aliases(net)  # of a tensor with several names a file may have any
    common = [name for name in wanted if name in given]
    matched = {name: given[name] for name in common if given[name].shape == wanted[name].shape}
    parts = {name.partition(".")[0] for name in own}
    extra = [name for name in given if name not in wanted]
    foreign = [name for name in extra if LEFT_BEHIND.search(name) or name.partition(".")[0] not in parts]
    missing = tuple(name for name in wanted if name not in given and not given.keys() & aliases.get(name, set()))
    unfilled = {*missing, *(name for name in common if name not in matched)}
    report = LoadReport(
        path=file,
        entry=entry,
        matched=tuple(matched),
        missing=missing,
        unexpected=tuple(name for name in extra if name not in foreign),
        foreign=tuple(foreign),
        mismatched=tuple(
            (name, tuple(given[name].shape), tuple(wanted[name].shape)) for name in common if name not in matched
        ),
        share=1 - sum(wanted[name].numel() for name in unfilled) / max(1, sum(t.numel() for t in wanted.values())),
    )
    if not matched:
        raise UserError(
            f"{file}: none of its {len(tensors)} tensors fits the network; is it of another architecture? The file has "
            f"{next(iter(tensors))} …, the network {next(iter(own))} …"
        )
    if report.share < min_share:
        raise UserError(
            f"init_from: {report.share:.1%} of the network's values would come from the file, the rest be random, less "
            f"than init_share ({min_share:.0%}): lower init_share where that is meant\n{report}"
        )
    if strict and not report.complete:
        raise UserError(f"the weights do not fit the network\n{report}")
    if strict and foreign:
        log.warning("%s", report)
    if ruined := [name for name, t in matched.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
        raise UserError(
            f"{file}: {len(ruined)} of its tensors hold values that are not finite ({ruined[0]} …): the run that wrote "
            "it had failed before; take an earlier checkpoint"
        )
    if whole := [n for n, t in matched.items() if wanted[n].is_floating_point() and not t.is_floating_point()]:
        kind = str(matched[whole[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"{file}: {len(whole)} of its tensors hold {kind} where the network has fractions ({whole[0]} …): "
            "quantised weights are not read; take the file of fp32, fp16 or bf16 that they were made from"
        )
    net.load_state_dict(matched, strict=False)
    return report


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name beside the file (or where a link leads to), which takes its place once it is written whole.
    UserError where it cannot be: the file is as it was."""
    temporary = file.resolve().with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        temporary.replace(file.resolve())
    except (OSError, RuntimeError, SafetensorError) as error:  # of the disk, of torch and of safetensors
        raise UserError(f"{file}: cannot be written ({error}); make room there or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with the mode of an ordinary one: safetensors itself makes it the owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    path.chmod(mode)


def save_weights(path: str | Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all: floating-point tensors as fp32, names as given.

    `metadata` needs "arch", the JSON of the network's description; "config" holds the JSON of the run's. Further
    entries (step, metrics …) are kept as they are.
    """
    parse(json.loads(metadata["arch"]))  # a file that does not describe its network is of no use: fail now
    tensors = {
        name: tensor.detach()
        .to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }
    with replacing(Path(path)) as temporary:
        write_tensors(temporary, tensors, {"mcir": __version__, **metadata})


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file (or of a folder's model.safetensors); empty if it has none."""
    file = locate(path)
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error


def build_from(path: str | Path, allow_import: bool = False) -> tuple[nn.Module, Arch, dict[str, str]]:
    """The network that a file of ours describes, with its weights, in eval mode; its description; the file's metadata.

    Raises UserError when the file does not describe its network (it is not of `save_weights`), does not fit it, or
    names a module to import (arch "import") and `allow_import` does not say that the file is trusted to.
    """
    metadata = read_metadata(path)
    if "arch" not in metadata:
        raise UserError(
            f"{path}: does not say what network it is of (mcir did not write it); describe the network in a config "
            "(arch: …) and name the file there (init_from)"
        )
    try:
        # The file is the weights: whatever the network was started from is not needed to rebuild it.
        described = {key: value for key, value in json.loads(metadata["arch"]).items() if key != "weights"}
        if described.get("name") == "import" and not allow_import:
            raise UserError(
                f"{path}: asks to import {described.get('target')}; allow it (allow_import) if you trust the file"
            )
        arch = parse(described)
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path}: describes a network that this version of mcir does not know ({error})") from error
    net = arch.build()
    load_into(net, path, strict=True)
    return net.eval(), arch, metadata
