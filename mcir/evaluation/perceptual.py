"""Metrics beside a protocol's PSNR and SSIM: MS-SSIM, LPIPS, DISTS, NIQE, and any function of the user's.

Each entry of `validation.metrics` says which way it is better and builds a function of two images. A metric sees what a
picture file would hold, whatever the protocol: RGB clamped to [0, 1] and rounded to 8 bits, nothing cut off. Networks
are frozen; ImageNet weights that cannot be downloaded may be given as a file.
"""

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from mcir.archs.state_dict import read_state_dict
from mcir.errors import UserError
from mcir.evaluation.metrics import WINDOW, blur, to_float64
from mcir.section import PathText, Section, parse_yaml

Better = Literal["higher", "lower"]
Measure = Callable[[Tensor, Tensor], Any]
"""(restored, clean), both (1, 3, H, W) in [0, 1] -> a number."""
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of MS-SSIM, finest scale first."""
NIQE_BLOCK = 96
BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


class _Metric(Section):
    better: ClassVar[Better]

    @property
    def label(self) -> str:
        """What results call it."""
        return self.name  # type: ignore[attr-defined]

    @property
    def where(self) -> str:
        return f"metric {self.label}"


class MSSSIM(_Metric):
    """Multi-scale SSIM (Wang et al., Asilomar 2003), five scales, the mean over red, green and blue; for images of more
    than 160 pixels a side."""

    better: ClassVar[Better] = "higher"
    name: Literal["ms_ssim"] = "ms_ssim"

    def build(self, device: torch.device) -> Measure:
        return lambda restored, clean: ms_ssim(to_float64(restored), to_float64(clean)).mean()


class LPIPS(_Metric):
    """Learned perceptual distance (Zhang et al., CVPR 2018), version 0.1, with torchmetrics' copy of its heads."""

    better: ClassVar[Better] = "lower"
    name: Literal["lpips"] = "lpips"
    network: Literal["alex", "vgg", "squeeze"] = "alex"
    """Tables of restored images mostly take alex; vgg is the loss of its authors."""
    weights: PathText = "imagenet"
    """`imagenet` (torchvision's download and cache) or a file with torchvision's keys (.pth or .safetensors)."""

    @property
    def label(self) -> str:
        return "lpips" if self.network == "alex" else f"lpips_{self.network}"

    def build(self, device: torch.device) -> Measure:
        net = _lpips(self.network, self.weights, self.where).to(device)
        return lambda restored, clean: net(restored, clean, normalize=True)


class DISTS(_Metric):
    """Deep structure and texture similarity (Ding et al., TPAMI 2020), as a distance, with torchmetrics' copy of its
    weights over VGG16."""

    better: ClassVar[Better] = "lower"
    name: Literal["dists"] = "dists"
    weights: PathText = "imagenet"
    """`imagenet` (torchvision's download and cache) or a file with torchvision's keys (.pth or .safetensors)."""

    def build(self, device: torch.device) -> Measure:
        return _dists(self.weights, self.where).to(device)


class NIQE(_Metric):
    """How unlike photographs the restored image is by itself (Mittal et al., SPL 2013), without the clean one: of the
    grey image, in blocks of 96 pixels, of which it needs two; computed on the CPU by iqa-torch, which ships its
    authors' parameters."""

    better: ClassVar[Better] = "lower"
    name: Literal["niqe"] = "niqe"

    def build(self, device: torch.device) -> Measure:
        niqe = _niqe(self.where)

        def of(restored: Tensor, clean: Tensor) -> Tensor:
            height, width = restored.shape[-2:]
            if (height // NIQE_BLOCK) * (width // NIQE_BLOCK) < 2:
                raise ValueError(f"an image of {height} x {width} does not hold two blocks of {NIQE_BLOCK} pixels")
            return niqe(restored.cpu())

        return of


class ImportedMetric(_Metric):
    """The user's own: a function of (restored, clean), both (1, 3, H, W) in [0, 1], that returns a number."""

    name: Literal["import"] = "import"
    target: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`package.module:function`, importable from the working directory or installed."""
    direction: Better
    """Which way it is better."""

    @property
    def better(self) -> Better:  # type: ignore[override]
        return self.direction

    @property
    def label(self) -> str:
        return self.target.partition(":")[2]

    def build(self, device: torch.device) -> Measure:
        module, _, function = self.target.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            found = getattr(importlib.import_module(module), function)
        except Exception as error:
            raise UserError(f"{self.where}: {self.target} cannot be imported ({error})") from error
        if not callable(found):
            raise UserError(f"{self.where}: {self.target} is no function")
        return found


AnyMetric = Annotated[
    Annotated[MSSSIM | LPIPS | DISTS | NIQE | ImportedMetric, Field(discriminator="name")],
    BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value),
]
"""A name alone stands for the metric with its defaults."""


def parse(texts: Sequence[str]) -> tuple[AnyMetric, ...] | None:
    """The metrics that a command names: `lpips`, `{name: lpips, network: vgg}`, or `none`; None where it names nothing.
    UserError for what is none."""
    if not texts or list(texts) == ["none"]:
        return () if texts else None
    found: list[Any] = []
    for text in texts:
        try:
            found.append(TypeAdapter(AnyMetric).validate_python(parse_yaml(text, f"--metrics {text}")))
        except ValidationError as error:
            fault = error.errors()[0]
            raise UserError(f"--metrics {text}: {'.'.join(map(str, fault['loc']))} {fault['msg']}") from None
    return tuple(found)


@torch.no_grad()
def measure(measures: Mapping[str, Measure], restored: Tensor, clean: Tensor) -> dict[str, float]:
    """The value of each metric; both images (1, 3, H, W), floating. ValueError for an image that one cannot take, or a
    value that is no number."""
    from mcir.restoration.inference import full_precision  # a config names metrics, and is read without it

    x, y = (image.float().clamp(0, 1).mul(255).round().div(255) for image in (restored, clean))
    values = {}
    for label, of in measures.items():
        try:
            with full_precision():
                values[label] = float(of(x, y))
        except (ValueError, TypeError) as error:
            raise ValueError(f"metric {label}: {error}") from error
    return values


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """(B, C, H, W) in [0, 1] -> (B, C). Contrast and structure of five scales, luminance of the last; between two
    scales 2 x 2 pixels are averaged, with zeros beside odd sides, as the package pytorch-msssim does."""
    if min(x.shape[-2:]) <= (WINDOW - 1) * 2 ** (len(SCALE_WEIGHTS) - 1):
        raise ValueError(f"images of {x.shape[-2]} x {x.shape[-1]} are too small: each side must be above 160 pixels")
    c1, c2 = 0.01**2, 0.03**2
    product = x.new_ones(x.shape[:2])
    for scale, weight in enumerate(SCALE_WEIGHTS, 1):
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = (blur(image) for image in (x, y, x * x, y * y, x * y))
        variances = (mean_xx - mean_x**2) + (mean_yy - mean_y**2)
        similarity = (2 * (mean_xy - mean_x * mean_y) + c2) / (variances + c2)
        if scale == len(SCALE_WEIGHTS):
            similarity = similarity * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        product = product * similarity.mean(dim=(2, 3)).clamp(min=0) ** weight
        padding = [side % 2 for side in x.shape[-2:]]
        x, y = (F.avg_pool2d(image, 2, padding=padding) for image in (x, y))
    return product


def _torchmetrics(where: str) -> None:
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        raise UserError(f"{where} needs torchmetrics: pip install 'mcir[metrics]'") from None


@functools.cache
def _niqe(where: str) -> Callable[[Tensor], Tensor]:
    try:
        from iqa.niqe import niqe_core
        from iqa.niqe.niqe import niqe
    except ImportError:
        raise UserError(f"{where} needs iqa-torch: pip install 'mcir[metrics]'") from None
    # Its mean of 1 x 36 makes a distance of 1 x 1, which NumPy since 2.4 does not take for a number.
    parameters = dict(niqe_core.NIQE_PRIS_PARAMS)
    niqe_core.NIQE_PRIS_PARAMS = parameters | {"mu_pris_param": parameters["mu_pris_param"].ravel()}
    return niqe


@functools.cache
def _lpips(network: str, weights: str, where: str) -> nn.Module:
    _torchmetrics(where)
    from torchmetrics.functional.image.lpips import _LPIPS

    net = _LPIPS(net=network, pnet_rand=True)  # type: ignore[arg-type]
    names = {key: re.sub(r"^slices?\.?\d+\.", "", key) for key in net.net.state_dict()}
    state = _backbone(BACKBONES[network], weights, where, set(names.values()))
    net.net.load_state_dict({key: state[name] for key, name in names.items()})
    return net.eval()


@functools.cache
def _dists(weights: str, where: str) -> nn.Module:
    _torchmetrics(where)
    from torchmetrics.functional.image import dists

    class OverFile(dists.DISTSNetwork):
        """Its own constructor downloads VGG16 before anything can be said."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            from torchvision.models import vgg16

            layers = vgg16(weights=None, init_weights=False).features[:30]
            names = set(layers.state_dict())
            layers.load_state_dict({n: t for n, t in _backbone("vgg16", weights, where, names).items() if n in names})
            pools = {i: layer for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)}
            starts = [0, *pools, len(layers)]
            for stage, (start, end) in enumerate(pairwise(starts), 1):
                parts = list(layers[start:end])
                if start in pools:
                    before = layers[start - 2]
                    assert isinstance(before, nn.Conv2d)
                    parts[0] = dists.L2pooling(channels=before.out_channels)
                setattr(self, f"stage{stage}", nn.Sequential(*parts))
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
            self.chns = [3, 64, 128, 256, 512, 512]
            heads = torch.load(dists._PATH_WEIGHT_DISTS, weights_only=True)
            self.alpha, self.beta = (nn.Parameter(heads[name], requires_grad=False) for name in ("alpha", "beta"))

    return OverFile().requires_grad_(False).eval()


def _backbone(model: str, weights: str, where: str, wanted: set[str]) -> dict[str, Tensor]:
    """torchvision's `features` of a model by their names in it, such as `0.weight`. UserError with the ways out."""
    from torchvision import models

    ways_out = f"set its weights to a file with the keys of torchvision's {model}"
    if weights == "imagenet":
        url = models.get_model_weights(model).IMAGENET1K_V1.url
        try:
            state = torch.hub.load_state_dict_from_url(url, weights_only=True, progress=False)
        except Exception as error:
            raise UserError(
                f"{where}: the ImageNet weights of {model} could not be downloaded ({error}): {ways_out}"
            ) from error
    else:
        state = read_state_dict(weights)
    state = {key.removeprefix("features."): value for key, value in state.items()}
    if missing := sorted(wanted - state.keys()):
        raise UserError(f"{where}: {weights} has no features.{missing[0]}: {ways_out}")
    return state
