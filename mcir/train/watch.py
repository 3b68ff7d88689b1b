"""Sees a run leave its sane band, and stops it before its weights are ruined.

Numbers that all ranks have agreed on are followed on the device, step by step. When one has been out of its band for
`patience` steps the gate closes: it makes the loss, and so the gradient, no number, and every later step is skipped on
all ranks, whatever the strategy (`clip_and_guard`). The host reads all this at log steps, where it ends the run.
"""

from pathlib import Path

import torch
from torch import Tensor

from mcir.errors import UserError
from mcir.train.checkpoint import NAME, damage, is_healthy
from mcir.train.config import WatchConfig

DECAY, WARMUP = 0.99, 100
"""Of the running means, a step; steps before they are trusted."""
LEAST_DEVIATION = 0.05, 0.1
"""The deviation counts as no less than this: of the loss as a share of its mean, of the logarithm of the norm."""
CLIP = 3.0
"""Deviations by which one step may move the means: a spike must not become what is usual."""
WHAT = "contrast", "loss"


class Watch:
    """Follows the reconstruction loss, the contrast and the gradient norm of a run."""

    def __init__(self, config: WatchConfig, device: torch.device) -> None:
        self.config = config
        # One tensor, of which the others are pieces, so that a step writes it at once.
        self._state = torch.zeros(12, dtype=torch.float64, device=device)
        self.count, pairs, self.last = self._state[0], self._state[1:9].view(4, 2), self._state[9:]
        self.mean, self.variance = pairs[:2]  # of the loss and of the logarithm of the gradient norm
        self.run, self.since = pairs[2:]  # of WHAT: steps in a row out of the band, and the first of them
        self._least = self._state.new_tensor([[LEAST_DEVIATION[0], 0.0], [0.0, LEAST_DEVIATION[1]]])
        self.spikes, self.highest = self._state.new_zeros(2, 2)  # since the last report, of what `mean` is of
        self.gate = torch.ones((), device=device)
        """Factor of the loss: 1, or nan when the run is to stop."""
        self.best_psnr = torch.zeros((), dtype=torch.float64)  # read on the host

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it; to be overwritten in place."""
        names = ("count", "mean", "variance", "run", "since", "best_psnr")
        return {f"watch.{name}": getattr(self, name) for name in names}

    @torch.no_grad()
    def see(self, step: int, reconstruction: Tensor, contrast: Tensor | None, norm: Tensor) -> None:
        """Take in a step's numbers, equal on all ranks. No host sync, and few operators, each of which is a launch."""
        now = torch.full_like(self.count, step)
        contrast = torch.zeros_like(reconstruction) if contrast is None else contrast
        given = torch.stack([reconstruction, norm, now, reconstruction, contrast, self.gate])
        given[1].clamp_(min=1e-30).log_()
        seen, last = given[:2], given[2:5]
        usable = (given - given).sum() == 0  # not of what is no number, nor behind a closed gate
        deviation = self.deviation()
        difference = seen - self.mean
        above = difference / deviation
        trusted = self.count >= WARMUP
        spiked = (above > self.config.deviations) & trusted & usable
        self.spikes += spiked
        torch.where(spiked, torch.maximum(self.highest, seen), self.highest, out=self.highest)
        lowered = torch.add(contrast, reconstruction.abs(), alpha=self.config.max_share) < 0
        run = (self.run + 1) * torch.stack([lowered, spiked[0]])
        since = torch.where(run == 1, now, self.since)

        moved = torch.where(trusted, above.clamp(-CLIP, CLIP) * deviation, difference)
        count = self.count + 1
        rate = count.reciprocal().clamp(min=1 - DECAY)  # a plain mean at first
        moves = rate * moved
        variance = torch.addcmul(self.variance, moves, moved)
        variance = torch.addcmul(variance, variance, rate, value=-1)
        new = torch.cat([count[None], self.mean + moves, variance, run, since, last])
        torch.where(usable, new, self._state, out=self._state)
        self.gate.masked_fill_((self.run >= self.config.patience).any() & usable, torch.nan)

    def deviation(self) -> Tensor:
        """Of the loss and of the logarithm of the gradient norm, no less than the least."""
        share, floor = self._least
        return torch.maximum(self.variance.sqrt(), torch.addcmul(floor, share, self.mean.abs()))

    @property
    def in_trouble(self) -> bool:
        """Whether a checkpoint of this moment would be one of a run that is leaving its band. Waits for the device."""
        return bool((self.run >= max(2, self.config.patience // 4)).any())

    @property
    def has_closed(self) -> bool:
        """Whether the gate is closed. Waits for the device."""
        return not bool(self.gate.isfinite())

    def report(self, folder: Path) -> tuple[dict[str, float], str | None]:
        """Scalars and, where there were spikes, a sentence, since the last report. Waits for the device.

        UserError where the gate has closed: it names the last checkpoint in `folder` from before the trouble.
        """
        if self.has_closed:
            raise UserError(self._stopped(folder))
        spikes, highest, mean = self.spikes.tolist(), self.highest.tolist(), self.mean.tolist()
        deviation = self.deviation()[0].item()
        self.spikes.zero_()
        self.highest.fill_(-torch.inf)
        scalars = {"watch/loss_spikes": spikes[0], "watch/grad_norm_spikes": spikes[1]}
        said = []
        if spikes[0]:
            usual = f"usually {mean[0]:.4g} +- {deviation:.2g}"
            said.append(f"the loss spiked in {spikes[0]:.0f} steps, up to {highest[0]:.4g} ({usual})")
        if spikes[1]:
            norms = [f"{torch.tensor(x).exp().item():.3g}" for x in (highest[1], mean[1])]
            said.append(f"the gradient norm spiked in {spikes[1]:.0f} steps, up to {norms[0]} (usually {norms[1]})")
        way_out = "; optim.max_grad_norm bounds what one step may do" if said else ""
        return scalars, " and ".join(said) + way_out or None

    def validated(self, psnr: float) -> str | None:
        """Take in a validation's PSNR in dB; a sentence where it has collapsed. Waits for the device then."""
        best = float(self.best_psnr)
        self.best_psnr.fill_(max(best, psnr))
        if psnr >= best - self.config.max_drop:
            return None
        loss = "while the training loss is in its usual band"
        if bool((self.run > 0).any()):
            loss = "and the training loss or the contrast is out of its band too"
        return (
            f"the validated PSNR is {psnr:.2f} dB and was {best:.2f} dB, {loss}: "
            "look at the pictures; the best checkpoint is kept (checkpoint.keep_best)"
        )

    def _stopped(self, folder: Path) -> str:
        (step, reconstruction, contrast), mean = self.last.tolist(), float(self.mean[0])
        which = int(self.run.argmax())
        since = int(self.since[which])
        good = last_before(folder, since)
        if WHAT[which] == "contrast":
            told = (
                f"the contrast has run away: since step {since} it has lowered the loss by more than "
                f"{self.config.max_share:g} of the reconstruction loss (watch.max_share); at step {step:.0f} the "
                f"contrast was {contrast:.4g}, the reconstruction loss {reconstruction:.4g}. Lower "
                "objective.contrast.weight, or give it as a share, such as {target_ratio: 0.05}"
            )
        else:
            told = (
                f"the loss has left its band: since step {since} it has been more than {self.config.deviations:g} "
                f"deviations above its running mean (watch.deviations); at step {step:.0f} it was "
                f"{reconstruction:.4g}, usually {mean:.4g}. Lower the learning rate, set optim.max_grad_norm, or look "
                "at the data"
            )
        where = f"go on from {good}, saved before that (--resume)" if good else "no checkpoint is from before that"
        return f"{told}; {where}. The weights were left alone after step {step:.0f}; `watch: null` turns this off"


def last_before(folder: Path, step: int) -> Path | None:
    """The newest whole, healthy checkpoint of a step before this one."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        name = NAME.fullmatch(path.name)
        if name and int(name[1]) < step and damage(path) is None and is_healthy(path):
            return path
    return None
