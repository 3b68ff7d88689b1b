"""The commands that pages, recipes and scripts show, and a copy of the tree to run them in, with what they name."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mcir.cli import main
from mcir.config import load
from mcir.weights.files import save_weights
from tests import hub
from tests.distributed.launch import environment, python_path

ROOT = Path(__file__).parents[1]
PROGRAMS = (
    *("accelerate", "bash", "docker", "for", "kubectl", "mcir", "pip", "podman", "py-spy", "pytest", "python"),
    *("sbatch", "scancel", "scontrol", "source", "srun", "tensorboard", "uv"),
)
COMMAND = re.compile(rf"([A-Z_]+=(\"[^\"]*\"|\S*) +)*(\.venv/bin/)?({'|'.join(PROGRAMS)}) ")


def _logical(lines: list[str]) -> list[str]:
    """A line that is indented belongs to the one before; what stands three spaces apart is a remark."""
    joined: list[str] = []
    for line in lines:
        text = re.split(r"(?<=\S) {3,}", line)[0].removesuffix("\\").rstrip()
        if joined and line.startswith(" "):
            joined[-1] += " " + text.lstrip()
        elif text:
            joined.append(text)
    return joined


def _in_prose(text: str) -> list[str]:
    return [code for code in re.findall(r"`([^`\n]+)`", text) if COMMAND.match(code)]


def shown(file: str) -> list[str]:
    """What a file shows, in order: of a page each line of a `sh` block and each command in backticks, of another file
    those in its comments, where lines that are indented stand for a block. A command in backticks may be given in part
    (with an …) or be named alone."""
    text = (ROOT / file).read_text()
    if not file.endswith(".md"):
        comments = [line[1:].removeprefix(" ") for line in text.splitlines() if line.startswith("#")]
        block = [line[2:] if line.startswith("  ") else "" for line in comments]
        return [line for line in _logical(block) if COMMAND.match(line + " ")] + _in_prose("\n".join(comments))
    prose, *rest = re.split(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    found = _in_prose(prose)
    for language, block, prose in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        assert language in ("", "python", "sh"), f"{file}: a block of {language}; commands stand in one of sh"
        found += [*(_logical(block.splitlines()) if language == "sh" else []), *_in_prose(prose)]
    return found


def arguments(command: str) -> list[list[str]]:
    """What each `mcir` of a command gets, as bash has it: loops and braces come out as what they mean."""
    script = f"mcir() {{ printf '%s\\0' \"$@\" ''; }}; {command.replace('.venv/bin/', '')}"
    said = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    return [words.split("\0") for words in said.split("\0\0")[:-1]]


SPLITS = "train", "test"
UNPACKED = {
    "BSDS500": "train/1.jpg val/2.jpg",
    "CBSD68": "1.png",
    "DDN-Data": " ".join(f"{split}/groundtruth/1.jpg {split}/input/1_1.jpg" for split in SPLITS),
    "DF2K": "DIV2K_train_HR/0001.png DIV2K_train_LR_bicubic/X4/0001x4.png clean/0001.png"
    " Flickr2K/Flickr2K_HR/000001.png Flickr2K/Flickr2K_LR_bicubic/X4/000001x4.png",
    "DFWB": "BSD400/1.jpg DIV2K/0001.png Flickr2K/000001.png WaterlooED/00001.bmp",
    "DID-Data": " ".join(f"{split}/groundtruth/1.jpg {split}/input/1.jpg" for split in SPLITS),
    "DIV2K": "DIV2K_train_HR/0001.png DIV2K_train_LR_bicubic/X2/0001x2.png DIV2K_train_LR_bicubic/X4/0001x4.png",
    "DIV2K_valid_HR": "0801.png",
    "Denoise": "BSD400/100075.jpg WED/00001.bmp",
    "FOLDER": "sharp/1.png blur/1.png",
    "GoPro": " ".join(f"{split}/GOPR_1/sharp/1.png {split}/GOPR_1/blur/1.png" for split in SPLITS),
    "HR": "1.png",
    "ITS": "clear/1.png hazy/1_1_0.9.png",
    "LOLv1": "our485/high/1.png our485/low/1.png eval15/high/1.png eval15/low/1.png",
    "LR": "1x4.png",
    "RESIDE-6K": " ".join(f"{split}/GT/1.jpg {split}/hazy/1.jpg" for split in SPLITS),
    "RESIDE-IN": " ".join(f"{split}/GT/1_1.png {split}/hazy/1_1.png" for split in SPLITS),
    "RESIDE-OTS": "clear/0025.jpg hazy/0025_0.8_0.1.jpg",
    "Rain100L": " ".join(f"{split}/target/1.png {split}/input/1.png" for split in SPLITS),
    "Rain13K": "train/target/1.jpg train/input/1.jpg",
    "SOTS": "indoor/gt/1400.png indoor/hazy/1400_1.png outdoor/gt/0001.png outdoor/hazy/0001_0.8_0.2.jpg",
    "SPA-Data": " ".join(f"{split}/groundtruth/1.png {split}/input/1.png" for split in SPLITS),
    "Set5": "HR/baby.png",
    "photos": "sharp/1.png blurred/1.png hr/1.png lr/1x4.png",
}
"""What the folders hold that commands read: a sample or two, with names as in the published archives."""
UNPACKED |= dict.fromkeys(
    ("set5", "set14", "b100", "urban100", "manga109"), "HR/1.png LR_bicubic/X2/1x2.png LR_bicubic/X4/1x4.png"
)
UNPACKED |= dict.fromkeys(
    ("rain200H", "rain200L"),
    " ".join(f"{split}/groundtruth/norain-1.png {split}/input/rain-1.png" for split in SPLITS),
)
UNPACKED |= dict.fromkeys(
    (f"test/{name}" for name in ("Test100", "Test1200", "Test2800", "Rain100H", "Rain100L")),
    "target/1.png input/1.png",
)
CUT = ("DF2K", "DFWB", "DIV2K", "GoPro")
"""Their images have a side of 512, of which pieces are cut; the others' one of 64."""


def unpack(folder: Path) -> None:
    """A photograph of the quick start under every name; `x4` is a quarter of the side."""
    shard = min((ROOT / "configs/quickstart/heldout").glob("*.parquet"))
    with Image.open(BytesIO(pq.read_table(shard)["clean"][0].as_py()["bytes"])) as photograph:
        for name, files in UNPACKED.items():
            for file in files.split():
                factor = int(found[1]) if (found := re.search(r"x(\d)\.", file)) else 1
                side = (512 if name in CUT else 64) // factor
                path = folder / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                photograph.resize((side, side)).save(path)


def _download(folder: Path) -> None:
    """The VGGs of contrasts, where torchvision keeps them; their weights are random."""
    from torchvision import models

    folder.mkdir(parents=True)
    for name in ("vgg16", "vgg19"):
        file = models.get_model_weights(name).IMAGENET1K_V1.url.rsplit("/", 1)[1]
        torch.save(models.get_model(name, weights=None).features.state_dict(prefix="features."), folder / file)


def _train(folder: Path) -> None:
    """Weights as somebody published them, on the Hub and as a file; they are random."""
    arch = load([ROOT / "configs/sr/swinir_light_x4_div2k.yaml"]).arch
    published = folder / "hub/models/owner/name/model.safetensors"
    published.parent.mkdir(parents=True)
    save_weights(published, arch.build().state_dict(), {"arch": arch.model_dump_json()})
    arch = load([ROOT / "configs/sr/edsr_light_x2_div2k.yaml"]).arch
    torch.save({"params": arch.build().state_dict()}, folder / "net.pth")


def in_this_process(command: str, folder: Path) -> str | None:
    """Of a command of `mcir`s alone that fails: the command, and what it says."""
    said, calls = StringIO(), arguments(command)
    assert calls, command
    for words in calls:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["mcir", *words])
            try:
                main()
            except SystemExit as end:
                if end.code:
                    return f"$ {command}\n{said.getvalue()[-3000:]}"
    return None


@dataclass
class Place:
    folder: Path
    variables: dict[str, str]

    def fault(self, command: str) -> str | None:
        """The same of any command, run by bash."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=environment() | self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        return f"$ {command}\n{done.stdout[-3000:]}" if done.returncode else None


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    """A copy of the tree with this Python as its .venv, data and weights as a reader has them, and a Hub."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
    (folder / ".venv").symlink_to(sys.prefix)
    unpack(folder)
    _download(folder / "torch/hub/checkpoints")
    _train(folder)
    with hub.serve(folder / "hub") as server:
        variables = {
            "PATH": f"{folder / '.venv/bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": python_path(folder),
            "PYTHONDONTWRITEBYTECODE": "",
            "TORCH_HOME": str(folder / "torch"),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": "hf_token",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        yield Place(folder, variables)
