"""The trajectory of golden/spn_trajectory in plain torch, by the formulas that its metadata gives: it equals the
official code's on its photographs, and so stands in for it on images that a seed draws."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import make_layers

TAPS = {3: 0.2, 8: 0.3, 15: 0.5}  # relu1_2, relu2_2, relu3_3
CASE: dict[str, Any] = {
    "steps": 12,
    "spn": {"negatives": [{"update_every": 3, "decay": 0.1}, {"update_every": 2, "decay": 0.5}]},
    "ema_decay": 0.999,
}


def vgg() -> nn.Sequential:
    """VGG16's `features` up to relu3_3, with weights that a seed draws."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = make_layers([64, 64, "M", 128, 128, "M", 256, 256, 256])
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layers.requires_grad_(False)


def drawn(net: nn.Module) -> dict[str, Tensor]:
    """What the golden file begins with, drawn: three networks and the batches of each step."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for prefix in ("initial", "initial_negative0", "initial_negative1"):
        for name, value in net.state_dict().items():
            tensors[f"{prefix}.{name}"] = value + 0.02 * torch.randn(value.shape, generator=generator)
    for step in range(1, CASE["steps"] + 1):
        coarse = torch.rand(2, 3, 12, 12, generator=generator)
        clean = F.interpolate(coarse, scale_factor=4, mode="bicubic").clamp(0, 1)
        tensors |= {f"clean.{step}": clean, f"degraded.{step}": F.avg_pool2d(clean, 2)}
    return tensors


def plain(case: dict[str, Any], begin: dict[str, Tensor], net: nn.Module, layers: nn.Sequential) -> dict[str, Tensor]:
    """`losses`, `final.*`, `final_negative0.*`, … and `final_ema.*` of training from what the tensors begin with."""

    def loaded(prefix: str) -> nn.Module:
        copy = deepcopy(net)
        copy.load_state_dict({k.removeprefix(prefix): v for k, v in begin.items() if k.startswith(prefix)})
        return copy

    def features(image: Tensor) -> list[Tensor]:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x, taps = (image - mean) / std, []
        for i, layer in enumerate(layers):
            x = layer(x)
            taps += [x.clone()] if i in TAPS else []  # the next layer may work in place
        return taps

    @torch.no_grad()
    def follow(average: nn.Module, decay: float) -> None:
        for own, value in zip(average.parameters(), target.parameters(), strict=True):
            own.copy_(decay * own + (1 - decay) * value)

    target, ema = loaded("initial."), loaded("initial.")
    schedules = case["spn"]["negatives"]
    negatives = [loaded(f"initial_negative{k}.") for k in range(len(schedules))]
    optimizer = torch.optim.Adam(target.parameters(), lr=2e-4, betas=(0.9, 0.99))
    losses = []
    for step in range(1, case["steps"] + 1):
        restored = target(begin[f"degraded.{step}"])
        reconstruction = (restored - begin[f"clean.{step}"]).abs().mean()
        distance = torch.zeros(())
        for negative in negatives:
            with torch.no_grad():
                past = features(negative(begin[f"degraded.{step}"]))
            for weight, a, b in zip(TAPS.values(), features(restored), past, strict=True):
                distance = distance + weight * (a - b).abs().mean() / len(negatives)
        optimizer.zero_grad()
        (reconstruction - 0.01 * distance).backward()
        optimizer.step()
        losses.append(torch.stack([reconstruction, 0.01 * distance]).detach())
        follow(ema, case["ema_decay"])
        for negative, schedule in zip(negatives, schedules, strict=True):
            if step % schedule["update_every"] == 0:
                follow(negative, schedule["decay"])
    final = {"final.": target, "final_ema.": ema} | {f"final_negative{k}.": n for k, n in enumerate(negatives)}
    return {"losses": torch.stack(losses)} | {
        prefix + name: value for prefix, net in final.items() for name, value in net.state_dict().items()
    }
