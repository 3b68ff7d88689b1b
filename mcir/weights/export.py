"""Weights for other programs: BasicSR, the networks' own repositories, ONNX Runtime and the Hugging Face Hub.

Our files already hold the official key names, so only the wrapping differs; nothing is converted that the other side
would have to convert back.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from mcir.archs import Arch
from mcir.archs.state_dict import PARALLEL_PREFIX, WEIGHTS_FILE, locate
from mcir.errors import UserError
from mcir.weights.files import replacing, save_weights
from mcir.weights.trained import Trained

Format = Literal["basicsr", "official", "onnx", "hub-folder"]

CONVOLUTIONAL = ("edsr", "ffanet", "nafnet")  # their graph is the same for every image size
ONNX_SIDE = 256
ONNX_TOLERANCE = 1e-3
OF_A_RUN = ("run.json", "checkpoints", "manifest.json", "state.json")
"""What a run or a checkpoint holds, and no export."""


def _module(state: dict[str, Tensor]) -> dict[str, Any]:
    return {f"{PARALLEL_PREFIX}{name}": tensor for name, tensor in state.items()}


def _params(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"params": state}


def _ffanet(state: dict[str, Tensor]) -> dict[str, Any]:
    """With the history that its main.py reads when it resumes, empty."""
    history = {"step": 0, "max_psnr": 0.0, "max_ssim": 0.0, "ssims": [], "psnrs": [], "losses": []}
    return {**history, "model": _module(state)}


# What the test script of each network's repository reads (FFA-Net, DehazeFormer and IDT load into DataParallel).
OFFICIAL: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "edsr": _params,
    "swinir": _params,
    "nafnet": _params,
    "ffanet": _ffanet,
    "dehazeformer": lambda state: {"state_dict": _module(state)},
    "idt": _module,
    "zoo": _params,
}


def export(
    trained: Trained,
    to: Format,
    output: Path | None = None,
    size: tuple[int, int] | None = None,
    pictures: Mapping[str, bytes] | None = None,
    licence: str | None = None,
    repo: str | None = None,
) -> Path:
    """Write the weights as another program reads them, and return where (by default NAME.pth, NAME.onnx or NAME).

    `basicsr` writes
    {"params": …}, `official` what the network's own repository loads, `onnx` a graph from (N, 3, H, W) in [0, 1] to the
    restored image (any size for convolutional networks, otherwise one: `size`, the network's own or 256 x 256), and
    `hub-folder` a folder with weights, config and model card, which shows `pictures` (PNG by caption), and names the
    `licence` of the weights and where they will be, `repo`. Raises UserError for an unknown format, a default name
    that is taken, an output that cannot be written or would replace what a run wrote, and missing packages.
    """
    if to not in get_args(Format):
        raise UserError(f"cannot export to '{to}': choose {', '.join(get_args(Format))}, hub")
    net, described = trained.net, trained.arch
    if output is None:
        output = Path(trained.name + {"onnx": ".onnx", "hub-folder": ""}.get(to, ".pth"))
        if output.exists():
            raise UserError(f"{output} is there already: give --output")
    wrap = OFFICIAL.get(described.name) if to == "official" else _params
    if wrap is None:
        raise UserError(f"network '{described.name}' is of no published repository: export to basicsr or hub-folder")
    check_output(trained, output, is_folder=to == "hub-folder")
    if to == "onnx":
        _write_onnx(net.eval(), described, output, size)
    elif to == "hub-folder":
        _write_hub_folder(trained, output, pictures or {}, licence, repo)
    else:
        content = wrap({name: tensor.contiguous() for name, tensor in net.state_dict().items()})
        with replacing(output) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    return output


def check_output(trained: Trained, output: Path, is_folder: bool) -> None:
    """UserError where it is known beforehand that the output cannot or must not be written; makes the folders above."""
    written = output / WEIGHTS_FILE if is_folder else output
    wanted = "folder" if is_folder else "file"
    try:
        if output.exists() and not (output.is_dir() if is_folder else output.is_file()):
            raise UserError(f"{output}: is there and no {wanted}; give a {wanted} to write")
        if is_folder and (found := [name for name in OF_A_RUN if (output / name).exists()]):
            raise UserError(f"{output}: holds what a run wrote ({found[0]}); give a folder of its own")
        if written.exists() and written.samefile(locate(trained.path)):
            raise UserError(f"{written}: holds the weights that are exported; give another output")
        written.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error}); choose another place") from error
    if not os.access(written.parent, os.W_OK | os.X_OK):
        raise UserError(f"{output}: {written.parent} is write-protected; choose another place")


def _onnx_size(arch: Arch, size: tuple[int, int] | None) -> tuple[int, int]:
    """The given size, checked, or the network's own: what the graph is traced with, and fixed to where it attends."""
    descriptor = arch.descriptor
    multiple = descriptor.size_multiple
    own = descriptor.fixed_size or max(ONNX_SIDE, descriptor.min_size)
    height, width = size or (-(-own // multiple) * multiple,) * 2
    for side in (height, width):
        if side < descriptor.min_size or side % multiple or descriptor.fixed_size not in (None, side):
            raise UserError(f"size {height} x {width}: the network takes sides of {_sides(arch)}")
    return height, width


def _sides(arch: Arch) -> str:
    descriptor = arch.descriptor
    if descriptor.fixed_size:
        return f"{descriptor.fixed_size} only"
    return f"at least {descriptor.min_size}, multiples of {descriptor.size_multiple}"


def _write_onnx(net: nn.Module, arch: Arch, output: Path, size: tuple[int, int] | None) -> None:
    """Trace, compare with torch where ONNX Runtime is installed, and write."""
    if missing := [name for name in ("onnx", "onnxscript") if not find_spec(name)]:
        raise UserError(f"exporting to ONNX needs {' and '.join(missing)}: pip install 'mcir[onnx]'")
    height, width = _onnx_size(arch, size)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    any_size = size is None and arch.name in CONVOLUTIONAL and not getattr(arch, "tlc", False)
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    if any_size:
        image = image.repeat(2, 1, 1, 1)  # a batch of 1 would be taken for a constant
    program = torch.onnx.export(
        net,
        (image,),
        input_names=["degraded"],
        output_names=["restored"],
        dynamo=True,
        dynamic_shapes=(free,) if any_size else None,
        verbose=False,
    )
    assert program is not None
    graph = program.model_proto.SerializeToString()
    if find_spec("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            expected = net(image)
        restored = torch.from_numpy(session.run(None, {"degraded": image.numpy()})[0])
        if (difference := (restored - expected).abs().max().item()) > ONNX_TOLERANCE:
            raise UserError(f"the ONNX graph differs from the network by {difference:.2g}; it is not written")
    with replacing(output) as temporary:
        temporary.write_bytes(graph)


def _write_hub_folder(
    trained: Trained, folder: Path, pictures: Mapping[str, bytes], licence: str | None, repo: str | None
) -> None:
    metadata = _metadata(trained)
    save_weights(folder / WEIGHTS_FILE, trained.net.state_dict(), metadata)
    config = json.loads(metadata["config"]) if "config" in metadata else {"arch": json.loads(metadata["arch"])}
    names = {caption: re.sub(r"\W+", "-", caption) + ".png" for caption in pictures}
    card = model_card(trained.net, trained.arch, metadata, names, licence, repo)
    beside = {names[caption]: picture for caption, picture in pictures.items()}
    for name, content in {"config.yaml": _yaml(config).encode(), **beside, "README.md": card.encode()}.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)


def _metadata(trained: Trained) -> dict[str, str]:
    """What the folder says of its weights: of the metrics those of this kind (a checkpoint's files hold the EMA's and
    the target's)."""
    kept = {key: value for key, value in trained.metadata.items() if key not in ("format", "mcir", "metrics")}
    kept |= {"arch": trained.arch.model_dump_json(exclude={"weights"})} if "arch" not in kept else {}
    measured = json.loads(trained.metadata.get("metrics", "{}"))
    of_these = {name: value for name, value in measured.items() if name.endswith(f"({trained.kind})")}
    kept |= {"kind": trained.kind} if trained.kind else {}
    return kept | ({"metrics": json.dumps(of_these)} if of_these else {})


def _yaml(content: Any) -> str:
    stream = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(content, stream)
    return stream.getvalue()


def model_card(
    net: nn.Module,
    arch: Arch,
    metadata: Mapping[str, str],
    pictures: Mapping[str, str] = MappingProxyType({}),
    licence: str | None = None,
    repo: str | None = None,
) -> str:
    """A Hub model card: what the network is, what it was trained on and how, what it reaches, how to run it.
    `pictures`: file names by caption."""
    config = json.loads(metadata.get("config", "{}"))
    metrics = json.loads(metadata.get("metrics", "{}"))
    parameters = sum(p.numel() for p in net.parameters())
    scale = arch.descriptor.scale
    task = f"x{scale} super-resolution" if scale > 1 else "image restoration"
    tags = ["image-restoration", *(["super-resolution"] if scale > 1 else []), arch.name, "mcir"]
    header: dict[str, Any] = {"license": licence or "unknown", "library_name": "mcir"}
    header |= {"pipeline_tag": "image-to-image", "tags": tags}
    sources = [
        entry.get("source") or {} for entry in config.get("data", {}).get("train", []) if isinstance(entry, dict)
    ]
    if datasets := [source["repo"] for source in sources if source.get("format") == "hub"]:
        header["datasets"] = datasets
    sections = [
        f"---\n{_yaml(header)}---",
        f"# {arch.name}\n\n{task.capitalize()}, {parameters:,} parameters, RGB in [0, 1] in and out"
        + (f"; step {metadata['step']}" if "step" in metadata else "")
        + ".",
        f"## Network\n\n```yaml\n{_yaml(json.loads(metadata['arch']))}```",
    ]
    if pictures:
        shown = "\n\n".join(f"![{caption}]({name})\n\n{caption}" for caption, name in pictures.items())
        sections.append(f"## Pictures\n\n{shown}")
    if "data" in config:
        sections.append(f"## Data\n\n```yaml\n{_yaml(config['data'])}```")
    if metrics:
        rows = "\n".join(f"| {name} | {value} |" for name, value in metrics.items())
        sections.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}")
    if config:
        sections.append("## Training\n\n`mcir train config.yaml` with the [config](config.yaml) of this folder.")
    place = f"hf://{repo}" if repo else "."
    measure = f"mcir evaluate --weights {place} --data config.yaml\n" if config.get("validation") else ""
    sections.append(
        f"## Use\n\n```sh\nmcir restore photo.png --weights {place} --output restored\n{measure}```\n\n"
        "```python\nfrom mcir.weights.trained import open_trained\n\n"
        f'net = open_trained(["{place}"])[0].net  # restored = net(degraded), (N, 3, H, W)\n```'
    )
    sections.append(
        f"## Licence\n\n{licence or 'Not stated: ask the author'}. mcir is Apache-2.0; images keep their own."
    )
    return "\n\n".join(sections) + "\n"
