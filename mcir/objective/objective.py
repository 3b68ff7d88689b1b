"""The objective: L_rec(restored, clean) - weight * mean_k D(restored, negative_k). The minus is right: the
negatives repel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mcir.objective.contrast import SPN, SPNConfig
from mcir.objective.reconstruction import L1, Reconstruction, Terms
from mcir.section import Section


class ObjectiveConfig(Section):
    """What the target is trained for."""

    reconstruction: Terms = (L1(),)
    """One loss or a list of them, each with its weight."""
    spn: SPNConfig | None = SPNConfig()
    """The contrast with the network's own history; null trains plainly."""

    @property
    def num_negatives(self) -> int:
        return len(self.spn.negatives) if self.spn else 0


class Objective(nn.Module):
    """Holds the frozen features; has no trained parameters."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.reconstruction = Reconstruction(config.reconstruction)
        self.spn: SPN | None = config.spn.build() if config.spn and config.num_negatives else None

    def forward(self, restored: Tensor, clean: Tensor, negatives: Sequence[Tensor]) -> dict[str, Tensor]:
        """The loss to minimise, `total`, and its parts, each term of a sum by its name; scalars in fp32."""
        terms = {name: values.mean() for name, values in self.reconstruction(restored, clean).items()}
        reconstruction = torch.stack(list(terms.values())).sum()
        parts = {"reconstruction": reconstruction}
        if len(terms) > 1:
            parts |= {f"reconstruction/{name}": value for name, value in terms.items()}
        if self.spn is None:
            return {"total": _poisoned(reconstruction), **parts}
        spn = self.spn(restored, negatives)
        return {"total": _poisoned(reconstruction - spn), **parts, "spn": spn}


def _poisoned(total: Tensor) -> Tensor:
    """The same value; but a loss that is not finite gives gradients that are not finite either, where L1's sign(nan)
    = 0 would hide it. Synchronised gradients then tell all ranks."""
    return total * (1 + 0 * total.detach())
