"""VGG features, tapped by name and computed only as deep as asked. Frozen, fp32 weights, outside every wrapper."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor, nn

from mcir.errors import UserError
from mcir.section import Section

CONVS_PER_STAGE = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # Simonyan & Zisserman 2015, columns D and E
RELEASED_LAYERS = {"relu1_2": 0.2, "relu2_2": 0.3, "relu3_3": 0.5}  # Aitical/MCLIR, options/FFANet_RESIDE_IN
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tap_indices(network: str) -> dict[str, int]:
    """`relu3_3` -> its index in torchvision's `vgg.features`."""
    indices, i = {}, 0
    for stage, convs in enumerate(CONVS_PER_STAGE[network], 1):
        for conv in range(1, convs + 1):
            indices[f"relu{stage}_{conv}"] = i + 1
            i += 2
        i += 1  # the pooling layer
    return indices


class FeaturesConfig(Section):
    """Which VGG layers compare two images, and where their weights come from."""

    network: Literal["vgg16", "vgg19"] = "vgg16"
    layers: dict[str, PositiveFloat] = Field(RELEASED_LAYERS, min_length=1)
    """Tap (relu1_1 ... relu5_4, after the ReLU) to weight. The default is the released SPN configuration."""
    weights: str = "imagenet"
    """`imagenet` (torchvision's download and cache), a file with torchvision's keys (.pth or .safetensors, may stop
    early), or `random` (seeded He initialisation: for work without a network, not for published numbers)."""

    @field_validator("layers")
    @classmethod
    def _known(cls, layers: dict[str, float], info) -> dict[str, float]:
        known = tap_indices(info.data.get("network", "vgg19"))
        unknown = [name for name in layers if name not in known]
        if unknown:
            raise ValueError(f"no layer {', '.join(unknown)}; the layers are {', '.join(known)}")
        return layers


class Features(nn.Module):
    """(B, 3, H, W) in [0, 1] -> one (B, C_l, H_l, W_l) tensor a tap, in the order of depth."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: str, layers: Mapping[str, float], weights: str) -> None:
        super().__init__()
        index = tap_indices(network)
        taps = sorted(layers, key=index.__getitem__)
        self.taps = tuple(index[name] for name in taps)
        self.tap_weights = tuple(layers[name] for name in taps)
        # NHWC, whatever the network's layout: a step with 4 negatives takes 0.82 to 0.87 of the time (CPU)
        self.layers = _load(network, self.taps[-1] + 1, weights).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> list[Tensor]:
        x = ((image - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                features.append(x)
        return features


def _load(network: str, depth: int, weights: str) -> nn.Sequential:
    """The first `depth` layers of torchvision's `features`, with weights."""
    from torchvision import models

    ways_out = "set objective.spn.features.weights to a file with torchvision's VGG keys, or to `random`"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = getattr(models, network)(weights=None, init_weights=False).features[:depth]
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
            if isinstance(layer, nn.ReLU):
                layers[i] = nn.ReLU(inplace=False)  # a tap must keep its values
    if weights == "random":
        return layers
    if weights == "imagenet":
        url = getattr(models, f"{network.upper()}_Weights").IMAGENET1K_V1.url
        try:
            state = torch.hub.load_state_dict_from_url(url, weights_only=True, progress=False)
        except Exception as error:
            raise UserError(
                f"the ImageNet weights of {network} could not be downloaded ({error}): {ways_out}"
            ) from error
    else:
        state = _read(Path(weights), ways_out)
    state = {key.removeprefix("features."): value for key, value in state.items()}
    wanted = layers.state_dict()
    missing = [key for key in wanted if key not in state]
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or wrong:
        fault = f"has no features.{missing[0]}" if missing else f"has another shape at features.{wrong[0]}"
        raise UserError(f"{weights} does not fit {network} up to layer {depth - 1}: it {fault}; {ways_out}")
    layers.load_state_dict({key: state[key] for key in wanted})
    return layers


def _read(path: Path, ways_out: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"objective.spn.features.weights: no file {path}; {ways_out}") from None
    except Exception as error:
        raise UserError(f"objective.spn.features.weights: {path} cannot be read ({error}); {ways_out}") from error
