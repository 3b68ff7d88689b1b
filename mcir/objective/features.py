"""Features of a classification network, tapped by name and computed only as deep as asked. Frozen, fp32 weights,
outside every wrapper, always in eval mode."""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor, nn

from mcir.errors import UserError
from mcir.section import PathText, Section

CONVS_PER_STAGE = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # Simonyan & Zisserman 2015, columns D and E
RESNET_STAGES = {"resnet152": 4}
RELEASED_LAYERS = {"relu1_2": 0.2, "relu2_2": 0.3, "relu3_3": 0.5}  # Aitical/MCLIR, options/FFANet_RESIDE_IN
RANGES = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "minus_one_to_one": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation by which images are normalised."""


def tap_indices(network: str) -> dict[str, int]:
    """`relu3_3` or `conv3_3` -> its index in torchvision's `vgg.features`; `layer2` -> its place among the resnet's
    children."""
    if network in RESNET_STAGES:
        return {f"layer{stage}": stage + 3 for stage in range(1, RESNET_STAGES[network] + 1)}  # conv1 bn1 relu maxpool
    indices, i = {}, 0
    for stage, convs in enumerate(CONVS_PER_STAGE[network], 1):
        for conv in range(1, convs + 1):
            indices[f"conv{stage}_{conv}"] = i
            indices[f"relu{stage}_{conv}"] = i + 1
            i += 2
        i += 1  # the pooling layer
    return indices


class FeaturesConfig(Section):
    """Which layers of which network compare two images, and where its weights come from."""

    network: Literal["vgg16", "vgg19", "resnet152"] = "vgg16"
    layers: dict[str, PositiveFloat] = Field(RELEASED_LAYERS, min_length=1)
    """Tap (relu1_1 ... relu5_4, after the ReLU; conv1_1 ... conv5_4, before it; layer1 ... layer4 of a resnet) to
    weight. The default is the released SPN configuration."""
    normalise: Literal["imagenet", "none", "minus_one_to_one"] = "imagenet"
    """What images in [0, 1] become before they enter: ImageNet's mean and deviation, as they are, or 2 v - 1."""
    weights: PathText = "imagenet"
    """`imagenet` (torchvision's download and cache), a file with torchvision's keys (.pth or .safetensors, may stop
    early), or `random` (seeded initialisation: for work without a network, not for published numbers)."""

    @field_validator("layers")
    @classmethod
    def _known(cls, layers: dict[str, float], info) -> dict[str, float]:
        known = tap_indices(info.data.get("network", "vgg19"))
        unknown = [name for name in layers if name not in known]
        if unknown:
            raise ValueError(f"no layer {', '.join(unknown)}; the layers are {', '.join(known)}")
        return layers

    def build(self) -> "Features":
        return Features(self.network, self.layers, self.weights, self.normalise)


class Features(nn.Module):
    """(B, 3, H, W) in [0, 1] -> one (B, C_l, H_l, W_l) tensor a tap, in the order of depth."""

    mean: Tensor
    std: Tensor
    layer_weights: Tensor
    """(L,) fp32: the taps' weights."""

    def __init__(self, network: str, layers: Mapping[str, float], weights: str, normalise: str = "imagenet") -> None:
        super().__init__()
        index = tap_indices(network)
        taps = sorted(layers, key=index.__getitem__)
        self.taps = tuple(index[name] for name in taps)
        self.tap_weights = tuple(layers[name] for name in taps)
        # NHWC, whatever the network's layout: a step with 4 negatives takes 0.82 to 0.87 of the time (CPU)
        self.layers = _load(network, self.taps[-1] + 1, weights).to(memory_format=torch.channels_last)
        mean, std = RANGES[normalise]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.register_buffer("layer_weights", torch.tensor(self.tap_weights))
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> list[Tensor]:
        x = ((image - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                features.append(x)
        return features

    @torch.inference_mode()
    def of_constant(self, image: Tensor) -> list[Tensor]:
        """The same of an image that nothing is differentiated by."""
        return self(image)

    def train(self, mode: bool = True) -> "Features":
        """Stays in eval mode: a batch normalised by its own statistics would be compared with another by other ones."""
        return super().train(False)


def _load(network: str, depth: int, weights: str) -> nn.Sequential:
    """The first `depth` layers of torchvision's network (`features` of a VGG, children of a resnet), with weights."""
    ways_out = "set it to a file with torchvision's keys, or to `random`"
    layers = _initial(network, depth)
    if weights == "random":
        return layers
    if weights == "imagenet":
        from torchvision import models

        url = models.get_model_weights(network).IMAGENET1K_V1.url
        try:
            state = torch.hub.load_state_dict_from_url(url, weights_only=True, progress=False)
        except Exception as error:
            raise UserError(
                f"features.weights: the ImageNet weights of {network} could not be downloaded ({error}): {ways_out}"
            ) from error
    else:
        state = _read(Path(weights), ways_out)
    prefix = "" if network in RESNET_STAGES else "features."
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    wanted = {key: value for key, value in layers.state_dict().items() if not key.endswith("num_batches_tracked")}
    missing = [key for key in wanted if key not in state]
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or wrong:
        fault = f"has no {prefix}{missing[0]}" if missing else f"has another shape at {prefix}{wrong[0]}"
        raise UserError(
            f"features.weights: {weights} does not fit {network} up to layer {depth - 1}: it {fault}; {ways_out}"
        )
    layers.load_state_dict({key: state[key] for key in wanted}, strict=False)
    return layers


def _initial(network: str, depth: int) -> nn.Sequential:
    """The layers with random weights, the same everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if network in RESNET_STAGES:
            from torchvision import models

            return nn.Sequential(OrderedDict(islice(models.get_model(network, weights=None).named_children(), depth)))
        return _vgg(CONVS_PER_STAGE[network])[:depth]


def _vgg(convs_per_stage: tuple[int, ...]) -> nn.Sequential:
    """torchvision's `vgg.features` with He initialisation. torchvision itself takes two seconds to import."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, convs in enumerate(convs_per_stage):
        for _ in range(convs):
            conv = nn.Conv2d(channels, channels := min(64 << stage, 512), 3, padding=1)
            layers += [conv, nn.ReLU()]  # not in place: a tap must keep its values
        layers.append(nn.MaxPool2d(2))
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _read(path: Path, ways_out: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"features.weights: no file {path}; {ways_out}") from None
    except Exception as error:
        raise UserError(f"features.weights: {path} cannot be read ({error}); {ways_out}") from error
