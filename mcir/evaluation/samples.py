"""What a network does to the first images of the sets that its run validated on: pictures for its model card."""

import logging

import torch
from pydantic import ValidationError

from mcir.errors import UserError
from mcir.evaluation.config import ValidationConfig
from mcir.evaluation.evaluate import Picture, pair_of
from mcir.evaluation.measure import rows_png
from mcir.restoration.inference import infer
from mcir.weights.trained import Trained, faults

log = logging.getLogger(__name__)

NUM_SETS = 3


def samples(trained: Trained, device: torch.device) -> dict[str, bytes]:
    """PNG by caption: degraded | restored | clean, the first image of each of the first sets. What is not on this
    machine has none, and a warning says so."""
    values = (trained.config or {}).get("validation")
    if not values:
        log.warning("%s names no validation sets: its card has no pictures", trained.origin)
        return {}
    net, descriptor, shown = trained.net_on(device), trained.arch.descriptor, {}
    try:
        sets = ValidationConfig.model_validate(values).sets
    except ValidationError as error:
        log.warning("the card has no pictures: the validation of %s cannot be read (%s)", trained.origin, faults(error))
        return {}
    for name, data in list(sets.items())[:NUM_SETS]:
        try:
            row = next(iter(data.open()), None)
            if row is None:
                raise UserError("no images")
            degraded, clean = pair_of(row, data, descriptor.scale, device)
            with torch.no_grad():
                restored = infer(net, descriptor, degraded, tile="auto").clamp(0, 1)
        except (UserError, ValueError) as error:
            log.warning("the card has no picture of %s: %s", name, error)
            continue
        picture = Picture(row.key, degraded[0].cpu(), restored[0].cpu(), clean[0].cpu())
        shown[f"{name}, {row.key}: degraded, restored, clean"] = rows_png({"restored": [picture]})
    return shown
