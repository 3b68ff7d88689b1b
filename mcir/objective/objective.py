"""The objective: L_rec(restored, clean) + weight * contrast(restored, clean, degraded, past)."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mcir.errors import below
from mcir.objective.contrast import AgainstImages
from mcir.objective.distance import compile_pass
from mcir.objective.features import Features
from mcir.objective.infonce import InfoNCEConfig
from mcir.objective.pcl import PCL, PCLConfig
from mcir.objective.ratio import Ratio, RatioConfig
from mcir.objective.reconstruction import L1, Reconstruction, Terms
from mcir.objective.sources import by_source
from mcir.objective.spn import SPNConfig
from mcir.objective.weight import Weight
from mcir.section import Section

AnyContrast = Annotated[SPNConfig | RatioConfig | InfoNCEConfig | PCLConfig, Field(discriminator="name")]


class ObjectiveConfig(Section):
    """What the target is trained for."""

    reconstruction: Terms = (L1(),)
    """One loss or a list of them, each with its weight."""
    contrast: AnyContrast | None = SPNConfig()
    """The contrast: spn, ratio (CR, CCR, DCR), infonce or pcl; null trains plainly."""

    @model_validator(mode="before")
    @classmethod
    def _spn_was_the_only_contrast(cls, values: Any) -> Any:
        """Checkpoints of mcir 0.1.0 have it under its name."""
        if not isinstance(values, dict) or "spn" not in values:
            return values
        if "contrast" in values:
            raise ValueError("objective.spn is now objective.contrast: write what is meant there")
        spn = values["spn"]
        rest = {key: value for key, value in values.items() if key != "spn"}
        return rest | {"contrast": {"name": "spn", **spn} if isinstance(spn, dict) else spn}

    @property
    def num_negatives(self) -> int:
        """Networks of the history."""
        return len(self.contrast.negatives) if self.contrast else 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Further columns of the shards whose images are negatives."""
        return self.contrast.columns if isinstance(self.contrast, AgainstImages) else ()


class Objective(nn.Module):
    """Holds the frozen features, the weight of the contrast, and what a contrast trains beside the target."""

    def __init__(self, config: ObjectiveConfig, num_sources: int = 1) -> None:
        super().__init__()
        self.num_sources = num_sources
        with below("objective"):
            self.reconstruction = Reconstruction(config.reconstruction)
        self.config = (
            config.contrast if config.contrast and (config.contrast.roles or config.contrast.num_negatives) else None
        )
        with below("objective.contrast"):
            self.contrast = self.config.build() if self.config else None
        self.weight = Weight(self.config.weight) if self.config else None

    def forward(
        self,
        restored: Tensor,
        clean: Tensor,
        degraded: Tensor,
        past: Sequence[Tensor],
        source: Tensor | None = None,
        others: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """The loss to minimise, `total`, and its parts: scalars in fp32, terms of a sum by name, `contrast` with its
        weight and sign.

        `past`: what the history restored, then the images of further columns, as the contrast's config lists them.
        `source` (B,): where the samples are from; then the parts say what each source adds (sources.py).
        `others`: further outputs of the network, stages or smaller scales; the reconstruction alone looks at them, each
        term summed over all outputs (MPRNet, MIMO-UNet, ConvIR).
        """
        images = self.reconstruction(restored, clean)
        for output in others:
            for name, values in self.reconstruction(output, reduced(clean, output)).items():
                images[name] = images[name] + values
        terms = {name: values.mean() for name, values in images.items()}
        reconstruction = reduce(torch.add, terms.values())
        parts = {"reconstruction": reconstruction}
        if len(terms) > 1:
            parts |= {f"reconstruction/{name}": value for name, value in terms.items()}
        if source is not None:
            parts |= by_source(sum(images.values()), restored, clean, source, self.num_sources)
        if self.config is None or self.contrast is None or self.weight is None:
            return {"total": _poisoned(reconstruction), **parts}
        roles = self.config.roles
        anchors = [image for image, role in zip(past, roles, strict=False) if role == "anchor"]
        negatives = [image for i, image in enumerate(past) if i >= len(roles) or roles[i] == "negative"]
        if isinstance(self.config, AgainstImages) and self.config.degraded:
            negatives.append(enlarged(degraded, clean))
        contrast = self.weight.value * self.contrast.term(restored, clean, negatives, anchors)
        total = _poisoned(reconstruction + contrast)
        return {"total": total, **parts, "contrast": contrast}

    def compile_passes(self) -> None:
        """From now on the features, and the pass over what they differ by, are compiled."""
        for module in self.modules():
            if isinstance(module, Features):
                module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
        compile_pass()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it; to be overwritten in place."""
        state: dict[str, Tensor] = {}
        if self.weight is not None and self.weight.ratio is not None:
            state |= {f"weight.{name}": tensor for name, tensor in self.weight.state_dict().items()}
        if isinstance(self.contrast, Ratio):
            state["best_psnr"] = self.contrast.best_psnr
        if isinstance(self.contrast, PCL):
            state |= {f"pcl.{name}": tensor for name, tensor in self.contrast.state().items()}
        return state

    def validated(self, psnr: float) -> None:
        """Take in a validation's PSNR in dB, equal on all ranks, which a curriculum goes by."""
        if isinstance(self.contrast, Ratio):
            self.contrast.best_psnr.fill_(max(float(self.contrast.best_psnr), psnr))  # in this order not a NaN

    def follow(self, losses: Mapping[str, Tensor]) -> None:
        """Take in a step's mean losses, equal on all ranks."""
        if self.weight is not None:
            self.weight.follow(losses["reconstruction"], losses["contrast"])


def enlarged(degraded: Tensor, clean: Tensor) -> Tensor:
    """`degraded` at the size of `clean`: as it is, or bicubically enlarged with the corners on the corners and clamped
    (PCL-SISR)."""
    if degraded.shape == clean.shape:
        return degraded
    return F.interpolate(degraded, clean.shape[-2:], mode="bicubic", align_corners=True).clamp(0, 1)


def reduced(clean: Tensor, output: Tensor) -> Tensor:
    """`clean` at the size of a smaller output: bilinear without antialiasing, as MIMO-UNet and ConvIR have it, which of
    halves and quarters is the mean of the (central) 2 x 2 pixels."""
    if clean.shape == output.shape:
        return clean
    return F.interpolate(clean, output.shape[-2:], mode="bilinear", align_corners=False)


def _poisoned(total: Tensor) -> Tensor:
    """The same value; but a loss that is not finite gives gradients that are not finite either, where L1's sign(nan)
    = 0 would hide it. Synchronised gradients then tell all ranks."""
    return total * (1 + 0 * total.detach())
