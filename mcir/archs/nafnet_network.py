"""The network that `nafnet.py` describes, apart from it: spandrel imports torchvision, which takes as long as torch.

spandrel's modules hold the weights, under the official keys. What they compute is computed here with the features of a
pixel side by side in memory, whatever the layout of image and weights: so the norm over them is torch's own, and a
1 x 1 convolution is one matrix product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from spandrel.architectures.NAFNet import NAFNet as SpandrelNAFNet
from spandrel.architectures.NAFNet.__arch import NAFNet_arch as official
from torch import Tensor, nn

from mcir.archs.base import PixelShuffle


class LayerNorm2d(official.LayerNorm2d):
    """Norm over the features of each pixel. (B, C, H, W) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return normalised.permute(0, 3, 1, 2)


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution as a matrix product. (B, C, H, W) -> (B, C', H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class NAFBlock(official.NAFBlock):
    """Gated convolutions with channel attention, then gated features, each with a scaled skip. (B, C, H, W) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.sg(self.conv2(self.conv1(self.norm1(x))))
        x = torch.addcmul(x, self.conv3(inner * self.sca(inner)), self.beta)
        return torch.addcmul(x, self.conv5(self.sg(self.conv4(self.norm2(x)))), self.gamma)


class Up(nn.Sequential):
    """To twice the size and half the features, and what was there on the way down. (B, C, H, W), (B, C / 2, 2 * H,
    2 * W) -> second's shape."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + skip


class NAFNet(SpandrelNAFNet):
    """(B, 3, H, W) in [0, 1] -> same shape and range, not clamped. Any size."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        exchanged = {
            official.NAFBlock: NAFBlock,
            official.LayerNorm2d: LayerNorm2d,
            nn.PixelShuffle: PixelShuffle,
        }
        for module in self.modules():
            module.__class__ = exchanged.get(type(module), type(module))
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                module.__class__ = Pointwise
        for up in self.ups:
            up.__class__ = Up

    def forward(self, degraded: Tensor) -> Tensor:
        height, width = degraded.shape[2:]
        image = self.check_image_size(degraded.contiguous(memory_format=torch.channels_last))
        dtype = (
            self.intro.weight.dtype
        )  # what a block makes of any input: given it too, all blocks of a level are one graph
        x, skips = self.intro(image).to(dtype), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x).to(dtype)  # (B, 2 * C, H / 2, W / 2)
        x = self.middle_blks(x)
        for decoder, up in zip(self.decoders, self.ups, strict=True):
            x = decoder(up(x, skips.pop()))
        return (self.ending(x) + image)[:, :, :height, :width]


def _box_mean(x: Tensor, size: int, dim: int) -> Tensor:
    """Means of all runs of `size` along `dim`, from one running sum whatever the size."""
    sums = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.cumsum(dim)], dim)
    num = x.shape[dim] - size + 1
    return (sums.narrow(dim, size, num) - sums.narrow(dim, 0, num)) / size


class LocalAverage(nn.Module):
    """The mean of a window around each position; windows are moved inside at the borders. Replaces a global pooling.

    (B, C, H, W) -> same, or (B, C, 1, 1) when the window covers the map.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height <= self.size and width <= self.size:
            return x.mean((2, 3), keepdim=True)
        rows, cols = min(self.size, height), min(self.size, width)
        mean = _box_mean(_box_mean(x.float(), rows, dim=2), cols, dim=3)  # in bf16 the running sums would be useless
        border = (cols - 1) // 2, cols // 2, (rows - 1) // 2, rows // 2
        return F.pad(mean, border, mode="replicate").to(x.dtype)


def localise(net: NAFNet, size: int) -> None:
    """Replace every global pooling by a local one over `size` pixels of the input image."""
    for blocks, scale in (
        *((encoder, level) for level, encoder in enumerate(net.encoders)),
        (net.middle_blks, len(net.encoders)),
        *((decoder, level) for level, decoder in zip(reversed(range(len(net.decoders))), net.decoders, strict=True)),
    ):
        for block in blocks:
            block.sca[0] = LocalAverage(max(size >> scale, 1))
