"""PSNR and SSIM exactly as the papers' tables compute them.

The same pair of images scores SSIM 0.976, 0.992 or 0.997 under the protocols that the tables mix, so a protocol is
named after what it reproduces and decides everything: colour, quantisation, border, window padding. Invariants: one
float64 value per image, whatever else is in the batch; quantisation is done in float32, as the official codes do it,
everything after it in float64 (but for the window of `nafnet`). NaN in a restored image gives NaN, never a number.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

PROTOCOLS = Literal["sr", "rgb", "ffanet", "dehazeformer", "derain", "nafnet"]

WINDOW = 11  # side of the Gaussian window; every protocol takes Wang's 11 with sigma 1.5
RADIUS = WINDOW // 2


def score(
    restored: Tensor, clean: Tensor, protocol: PROTOCOLS = "sr", *, scale: int | None = None
) -> dict[str, Tensor]:
    """PSNR in dB and SSIM of each image of a batch, under a published protocol.

    `restored` and `clean`: (B, 3, H, W), floating, RGB in [0, 1], on one device. `restored` is clamped to [0, 1] as all
    the official codes do; `clean` must lie there. Returns {"psnr": (B,), "ssim": (B,)}, float64, on that device.

    - `sr`: 8-bit, `scale` pixels cut off each side, unrounded Y of ITU-R BT.601 (16 to 235). Super-resolution tables.
      SwinIR, main_test_swinir.py; BasicSR, metrics/psnr_ssim.py with test_y_channel.
    - `rgb`: 8-bit RGB, nothing cut. BasicSR, metrics/psnr_ssim.py.
    - `ffanet`: RGB without quantisation, SSIM window padded with zeros. FFA-Net, net/metrics.py (dehazing).
    - `dehazeformer`: RGB without quantisation, SSIM after averaging down to a shorter side of about 256. DehazeFormer,
      test.py.
    - `derain`: 8-bit, Y rounded to 8 bits as MATLAB's rgb2ycbcr does. IDT, evaluaterain.m; Restormer and MPRNet,
      evaluate_PSNR_SSIM.m.
    - `nafnet`: 8-bit RGB, SSIM window of 11 x 11 x 11 over (H, W, colour) with edges repeated, which is MATLAB's
      ssim(RGB). NAFNet, basicsr/metrics/psnr_ssim.py (deblurring).

    Identical images: PSNR is inf, except 100 under `ffanet`, whose code says so. SSIM is 1.
    `scale` is required by `sr` and read by no other protocol.
    ValueError: wrong shape, type or range, or an image smaller than the SSIM window.
    """
    if protocol not in get_args(PROTOCOLS):
        raise ValueError(f"Unknown protocol {protocol!r}: one of {', '.join(get_args(PROTOCOLS))}.")
    check_images(restored, clean)
    border = 0
    if protocol == "sr":
        if scale is None or scale < 1:
            raise ValueError(f"Protocol sr needs scale, a positive integer (the border that it cuts), not {scale}.")
        border = scale
    pair = [crop(image, border) for image in (restored, clean)]
    if protocol in ("ffanet", "dehazeformer"):
        x, y = (to_float64(image).clamp(0, 1) for image in pair)
        peak = 1.0
    else:
        x, y = (to_float64(image.float().clamp(0, 1).mul(255).round()) for image in pair)
        peak = 255.0

    match protocol:
        case "sr":
            x, y = luma(x), luma(y)
            ssim_x, ssim_y = x, y
        case "derain":
            x, y = (luma(image).add(0.5).floor() for image in (x, y))  # MATLAB rounds halves up
            ssim_x, ssim_y = x, y
        case "dehazeformer":
            ssim_x, ssim_y = shrink(x), shrink(y)
        case "nafnet":
            ssim_x, ssim_y = (F.pad(image.float(), (RADIUS,) * 4, mode="replicate") for image in (x, y))
        case "ffanet":
            ssim_x, ssim_y = (F.pad(image, (RADIUS,) * 4) for image in (x, y))
        case _:
            ssim_x, ssim_y = x, y
    if min(ssim_x.shape[-2:]) < WINDOW:
        height, width = clean.shape[-2:]
        raise ValueError(
            f"Images of {height} x {width} are too small for protocol {protocol}: the SSIM window needs "
            f"{WINDOW + 2 * border} x {WINDOW + 2 * border}."
        )

    decibels = psnr(x, y, peak)
    if protocol == "ffanet":
        decibels = decibels.masked_fill(decibels == math.inf, 100.0)
    similarity = ssim(ssim_x, ssim_y, peak, blur_with_colour if protocol == "nafnet" else blur)
    return {"psnr": decibels.to(restored.device), "ssim": similarity.to(restored.device)}


def psnr(x: Tensor, y: Tensor, peak: float) -> Tensor:
    """10 log10(peak^2 / mean squared error) of each image, in dB: (B, C, H, W) -> (B,). Identical images: inf."""
    return 10 * torch.log10(peak**2 / (x - y).square().mean(dim=(1, 2, 3)))


def ssim(x: Tensor, y: Tensor, peak: float, window_mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean structural similarity (Wang et al., TIP 2004) wherever the window fits: (B, C, H, W) -> (B,)."""
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (window_mean(image) for image in (x, y, x * x, y * y, x * y))
    square_x, square_y, product = mean_x.square(), mean_y.square(), mean_x * mean_y
    similarity = (2 * product + c1) * (2 * (mean_xy - product) + c2)
    similarity /= (square_x + square_y + c1) * ((mean_xx - square_x) + (mean_yy - square_y) + c2)
    return similarity.double().mean(dim=(1, 2, 3))


def blur(image: Tensor) -> Tensor:
    """Weighted mean in the 11 x 11 Gaussian window, without padding: (B, C, H, W) -> (B, C, H - 10, W - 10).

    One axis after the other, as sums of shifted slices: in float64 twice as fast as a convolution, on any device.
    """
    weights = gaussian().tolist()
    for dim in (2, 3):
        length = image.shape[dim] - 2 * RADIUS
        shifted = [image.narrow(dim, start, length) for start in range(WINDOW)]
        image = shifted[RADIUS] * weights[RADIUS]
        for i in range(RADIUS):  # the window is symmetric
            image.add_(shifted[i] + shifted[WINDOW - 1 - i], alpha=weights[i])
    return image


def blur_with_colour(image: Tensor) -> Tensor:
    """Weighted mean in NAFNet's 11 x 11 x 11 window over (H, W, colour): (B, 3, H, W) -> (B, 3, H - 10, W - 10).

    The first and last colour are repeated. Neither separable nor float64, on purpose: the official code sums 1331 terms
    in float32, which moves SSIM by 2e-5 on photographs and by 1e-3 in flat regions, in the published numbers too.
    """
    g = gaussian()
    window = g[:, None, None] * g[:, None] * g  # (colour, H, W)
    channels = image.shape[1]
    kernel = torch.zeros(channels, channels + 2 * RADIUS, WINDOW, WINDOW, dtype=window.dtype)
    for channel in range(channels):
        kernel[channel, channel : channel + WINDOW] = window
    repeated = torch.arange(-RADIUS, channels + RADIUS, device=image.device).clamp(0, channels - 1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return F.conv2d(image[:, repeated], kernel.to(image))


def gaussian() -> Tensor:
    """Wang's window along one axis: 11 weights of sigma 1.5 that sum to 1, float64."""
    weights = torch.exp(torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64).square() / (-2 * 1.5**2))
    return weights / weights.sum()


def luma(image: Tensor) -> Tensor:
    """Y of ITU-R BT.601 in [16, 235] of RGB in [0, 255], not rounded: (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = image.split(1, dim=1)
    return (65.481 * red + 128.553 * green + 24.966 * blue) / 255 + 16


def shrink(image: Tensor) -> Tensor:
    """DehazeFormer's test: average-pooled by the shorter side / 256, rounded half to even, if that is 2 or more."""
    height, width = image.shape[-2:]
    factor = max(1, round(min(height, width) / 256))
    return F.adaptive_avg_pool2d(image, (int(height / factor), int(width / factor))) if factor > 1 else image


def crop(image: Tensor, border: int) -> Tensor:
    """Without `border` pixels on each side; empty if nothing is left."""
    return image[..., border : image.shape[-2] - border, border : image.shape[-1] - border] if border else image


def to_float64(image: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return image.to("cpu" if image.device.type == "mps" else image.device).double()


def check_images(restored: Tensor, clean: Tensor) -> None:
    """ValueError unless both are (B, 3, H, W), floating, of one shape and device, and `clean` lies in [0, 1]."""
    for name, image in (("restored", restored), ("clean", clean)):
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(f"{name} must be (B, 3, H, W), not {tuple(image.shape)}.")
        if not image.is_floating_point():
            raise ValueError(f"{name} must be floating in [0, 1], not {image.dtype}: divide by 255.")
    if restored.shape != clean.shape:
        raise ValueError(f"restored is {tuple(restored.shape)}, clean is {tuple(clean.shape)}: they must be equal.")
    if restored.device != clean.device:
        raise ValueError(f"restored is on {restored.device}, clean on {clean.device}: they must be on one device.")
    low, high = clean.min().item(), clean.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN; the margin is for images resized in float
        raise ValueError(f"clean must lie in [0, 1], but spans [{low:g}, {high:g}].")
