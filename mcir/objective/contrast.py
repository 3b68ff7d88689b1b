"""What the contrasts have in common: a weight, features, and a history.

Each is a file of its own (spn, ratio, infonce, pcl) with a module whose `term(restored, clean, negatives, anchors)` is
a scalar in fp32 to be added to the loss, unweighted, whatever its sign. Gradients flow through `restored` alone.
"""

from pydantic import Field, PositiveFloat, model_validator

from mcir.objective.features import FeaturesConfig
from mcir.objective.schedule import Schedule
from mcir.objective.weight import TargetRatio
from mcir.section import Section


def released_negatives() -> tuple[Schedule, ...]:
    """Those of Aitical/MCLIR, options/FFANet_RESIDE_IN, but for their start."""
    return tuple(Schedule(update_every=n) for n in (100, 200, 500, 1000))


class ContrastConfig(Section):
    """What every contrast has."""

    weight: PositiveFloat | TargetRatio = TargetRatio(target_ratio=0.05)
    """Factor of the contrast in the loss: a number, or `{target_ratio: 0.05}`, which keeps it at that share of the
    reconstruction loss."""
    features: FeaturesConfig = FeaturesConfig()
    negatives: tuple[Schedule, ...] = Field(default_factory=released_negatives)
    """The history: one entry a network. The default is the released FFANet configuration; an empty list has none."""

    @property
    def roles(self) -> list[str]:
        """`negative` or `anchor` for each image of the past, in the order of `Negatives`."""
        return [schedule.role for schedule in self.negatives for _ in range(schedule.views)]

    @property
    def num_negatives(self) -> int:
        """How many images are pushed away from."""
        return self.roles.count("negative")


class AgainstImages(ContrastConfig):
    """A contrast whose negatives may be other images than the history's."""

    degraded: bool = False
    """Whether the degraded image, enlarged bicubically where the network enlarges, is a negative."""
    columns: tuple[str, ...] = ()
    """Further image columns of the shards that are negatives, of the clean image's size: they get its crop and flips
    (CCR's images restored by other networks)."""

    @property
    def num_negatives(self) -> int:
        return super().num_negatives + len(self.columns) + self.degraded

    @model_validator(mode="after")
    def _not_empty(self) -> "AgainstImages":
        if not self.num_negatives:
            raise ValueError("there is nothing to push away from: give negatives, columns or degraded: true")
        return self
