"""PCL: restored images are told from negatives by cosines in a small embedding that is trained beside the target.

Wu et al., "A Practical Contrastive Learning Framework for Single-Image Super-Resolution", TNNLS 2023
(Aitical/PCL-SISR, src/loss/adversarial.py and discriminator.py). Here the contrast's gradient reaches the network: the
released code computes the restored image's features under `no_grad`, so that its term has none.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from mcir.objective.contrast import AgainstImages

UNITS = ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2))
"""Channels and stride of the embedding's units."""
COMPARED = 4
"""The unit whose output is compared: 256 channels at an eighth of the image."""


class PCLConfig(AgainstImages):
    """weight * mean_p -log(e^s(restored, p) / (e^s(restored, p) + sum_k e^s(restored, negative_k))), s the mean over
    places of the cosine over channels, one a sample, in an embedding of Haar details. The positives p are the clean
    image, sharpened copies of it and the anchors. The embedding takes a step of Adam with each micro-batch, on the dual
    contrastive loss between positives and full-size negatives; `features` has no part in it."""

    name: Literal["pcl"] = "pcl"
    sharpened: NonNegativeInt = 0
    """Copies of the clean image with its sharpness times 0.5 to 3, further positives."""
    blurred: NonNegativeInt = 0
    """Copies of the clean image under Gaussians of 3 to 11 pixels and sigma 0.1 to 2, further negatives."""
    embedding_lr: PositiveFloat = 5e-5

    @property
    def num_negatives(self) -> int:
        return super().num_negatives + self.blurred

    @model_validator(mode="after")
    def _no_features(self) -> "PCLConfig":
        if self.features != type(self.features)() and self.features != type(self.features)(weights="random"):
            raise ValueError("features: pcl compares in an embedding of its own; leave them out")
        return self

    def build(self) -> "PCL":
        return PCL(self)


class Embedding(nn.Module):
    """(B, 3, H, W), sides even -> compared features (B, 256, H / 8, W / 8) and 16 logits an image (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        inputs = [9, *(channels for channels, _ in UNITS)]
        self.units = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, channels, 3, stride, padding=1, bias=False),
                # never in eval mode in the release: every batch is normalised by its own statistics
                nn.BatchNorm2d(channels, track_running_stats=False),
            )
            for before, (channels, stride) in zip(inputs, UNITS, strict=False)
        )
        self.head = nn.Conv2d(UNITS[-1][0], 1, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x, compared = haar(image), image
        for i, unit in enumerate(self.units):
            x = F.leaky_relu(unit(x), 0.2)
            if i == COMPARED:
                compared = x
        return compared, self.head(F.adaptive_avg_pool2d(x, 4)).flatten(1)


class PCL(nn.Module):
    """The term of `PCLConfig`, unweighted. In training mode each call first moves the embedding. Collective then."""

    def __init__(self, config: PCLConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding().requires_grad_(False)
        self._optimizer: torch.optim.Optimizer | None = None

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def term(self, restored: Tensor, clean: Tensor, negatives: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
        positives = [clean, *(sharpened(clean) for _ in range(self.config.sharpened)), *anchors]
        # the degraded image, which comes last, is no fake for the embedding to learn
        fakes = [*(blurred(clean) for _ in range(self.config.blurred)), *negatives]
        low = [fakes.pop()] if self.config.degraded else []
        if self.training:
            self._learn([*positives[1:], clean], [*fakes, restored.detach()])
        own = self.embedding(restored)[0]
        with torch.no_grad():
            near, far = ([self.embedding(image)[0] for image in images] for images in (positives, [*fakes, *low]))
        return info_nce(own, near, far)

    def state(self) -> dict[str, Tensor]:
        """Embedding and moments, to be overwritten in place."""
        moments = self._adam().state
        state: dict[str, Tensor] = {}
        for name, parameter in self.embedding.named_parameters():
            state |= {name: parameter.data} | {f"{name}/{key}": value for key, value in moments[parameter].items()}
        return state

    def _learn(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> None:
        """A step on the dual loss, the gradients being the mean of all ranks'; none where they are not finite."""
        optimizer, parameters = self._adam(), list(self.embedding.parameters())
        with torch.enable_grad():
            self.embedding.requires_grad_(True)
            logits = [torch.cat([self.embedding(image)[1].flatten() for image in images]) for images in (real, fake)]
            gradients = torch.autograd.grad(dual(*logits), parameters)
            self.embedding.requires_grad_(False)
        together = torch.cat([gradient.flatten() for gradient in gradients])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(together)
            together /= dist.get_world_size()
        for parameter, gradient in zip(parameters, together.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        optimizer.found_inf = (~together.isfinite().all()).float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()

    def _adam(self) -> torch.optim.Optimizer:
        """Made when the embedding is where it stays; its moments are there from the start."""
        if self._optimizer is None:
            parameters = list(self.embedding.parameters())
            self._optimizer = torch.optim.Adam(parameters, self.config.embedding_lr, (0.9, 0.999), 1e-8, fused=True)
            for p in parameters:
                moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        return self._optimizer


def info_nce(own: Tensor, positives: Sequence[Tensor], negatives: Sequence[Tensor]) -> Tensor:
    """Mean over positives and samples of -log softmax of the positive's similarity among the negatives'."""
    far = torch.stack([similarity(own, negative) for negative in negatives])
    logits = [torch.cat([similarity(own, positive)[None], far]) for positive in positives]  # (1 + K, B)
    return -torch.stack([x.log_softmax(0)[0] for x in logits]).mean()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(B,): the mean over places of the cosine over channels."""
    return (F.normalize(a) * F.normalize(b)).sum(1).mean((1, 2))


def dual(real: Tensor, fake: Tensor) -> Tensor:
    """The dual contrastive loss of logits: each real one among all fakes, each fake one, negated, among all reals."""
    return F.softplus(fake.logsumexp(0) - real).mean() + F.softplus((-real).logsumexp(0) + fake).mean()


def haar(image: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 9, H / 2, W / 2): the details LH, HL, HH of one level."""
    a, b = image[..., ::2, ::2], image[..., ::2, 1::2]
    c, d = image[..., 1::2, ::2], image[..., 1::2, 1::2]
    return torch.cat([a + b - c - d, a - b + c - d, a - b - c + d], 1) / 2


def sharpened(image: Tensor) -> Tensor:
    """Each image away from its smoothed self by a factor of its own, the border as it is."""
    kernel = torch.ones(1, 1, 3, 3, device=image.device, dtype=image.dtype)
    kernel[..., 1, 1] = 5
    smooth = image.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(image, (kernel / 13).expand(3, 1, 3, 3), groups=3)
    factor = 0.5 + 2.5 * torch.rand(len(image), 1, 1, 1, device=image.device, dtype=image.dtype)
    return (smooth + factor * (image - smooth)).clamp(0, 1)


def blurred(image: Tensor) -> Tensor:
    """Each image under a Gaussian of its own sigma and extent, borders mirrored."""
    num = len(image)
    sigma = 0.1 + 1.9 * torch.rand(num, 1, device=image.device, dtype=image.dtype)
    radius = torch.randint(1, 6, (num, 1), device=image.device)
    offsets = torch.arange(-5, 6, device=image.device)
    window = torch.exp(-((offsets / sigma) ** 2) / 2) * (offsets.abs() <= radius)  # (B, 11)
    window = (window / window.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None, None]  # (3 B, 1, 1, 11)
    x = F.pad(image, (5, 5, 5, 5), mode="reflect").flatten(0, 1)[None]
    return F.conv2d(F.conv2d(x, window, groups=3 * num), window.mT, groups=3 * num)[0].unflatten(0, (num, 3))
