"""Validation inside a run: measure the sets, show pictures, remember the best, and close with the table.

The weights that are validated are those of the EMA, where there is one and the config does not say otherwise, whole on
every rank in a replica of the network.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from mcir.evaluation.config import MEAN, ValidationConfig
from mcir.evaluation.evaluate import Picture, Scores, baseline, evaluate, mean_of_sets
from mcir.evaluation.pictures import comparison_png, results_table
from mcir.parallel.shards import full_params
from mcir.restoration.inference import infer
from mcir.train.graphs import operator_by_operator
from mcir.train.record import Record
from mcir.train.scores import save as save_scores
from mcir.train.state import State
from mcir.train.tracking import Tracker


class Validation:
    """Holds the replica. `net` is the network before `accelerator.prepare`."""

    def __init__(self, net: nn.Module) -> None:
        self.replica = deepcopy(net).requires_grad_(False).eval()

    def run(self, config: ValidationConfig, state: State, tracker: Tracker, record: Record, last: bool) -> bool:
        """Measure all sets; whether the deciding metric has never been better. Collective.

        `last` closes the run: the table and the pictures against the baseline.
        """
        scale, num_pictures = state.config.arch.descriptor.scale, state.config.tracking.num_images
        self._fill(state)
        kind = "ema" if state.ema and config.weights != "target" else "target"
        if state.ema and kind == "ema" and (youth := state.ema.youth(state.step)):
            tracker.message(f"step {state.step}: {youth}")
        results: dict[str, tuple[Scores, list[Picture]]] = {}
        for name, data in config.sets.items():
            scores, pictures = evaluate(
                lambda degraded: self.restore(degraded, state, record),
                data,
                scale,
                state.accelerator,
                num_pictures,
                metrics=config.metrics,
            )
            results[name] = scores, pictures
            if scores.failed:
                first = next(iter(scores.failed.values()))
                tracker.message(f"step {state.step}: {name} without {len(scores.failed)} images, the first: {first}")
            mean = scores.mean()
            state.measured |= {f"{name}/{metric} ({kind})": round(value, 4) for metric, value in mean.items()}
            tracker.scalars(state.step, {f"validation/{name}/{metric}": value for metric, value in mean.items()})
            tracker.pictures(state.step, name, pictures, self._negative_pictures(pictures, state))
            more = "".join(f", {metric.label} {mean[metric.label]:.4f}" for metric in config.metrics)
            tracker.message(f"step {state.step}: {name} PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.4f}{more}")
        means = mean_of_sets({name: scores.mean() for name, (scores, _) in results.items()})
        if len(results) > 1:
            tracker.scalars(state.step, {f"validation/{MEAN}/{metric}": means[MEAN][metric] for metric in means[MEAN]})
        if state.accelerator.is_main_process:
            save_scores(tracker.run_dir, state.step, kind, {name: scores for name, (scores, _) in results.items()})
        if last:
            self._report(config, state, tracker, results)
        where, metric = (config.best or f"{next(iter(config.sets))}/psnr").rsplit("/", 1)
        value = means[where][metric]
        state.objective.validated(means[where]["psnr"])
        if state.watch and (said := state.watch.validated(means[where]["psnr"])):
            tracker.message(f"step {state.step}: {said}")
        sign = -1 if metric in config.lower_is_better else 1
        better = math.isfinite(value) and (state.best is None or sign * value > sign * state.best[0])
        if better:
            state.best = value, f"step-{state.step:08d}"
            best = {"metric": f"{where}/{metric}", "value": value, "checkpoint": state.best[1]}
            record.update(step=state.step, best=best)
        if state.best is not None:
            tracker.scalars(state.step, {f"best/{where}/{metric}": state.best[0]})
        return better

    def restore(self, degraded: Tensor, state: State, record: Record) -> Tensor:
        """The validated weights on one batch; no collective."""
        record.keep_fresh(state.step)
        validation = state.config.validation
        tile = validation.tile if validation else None
        return infer(self.replica, state.config.arch.descriptor, degraded, tile=tile)

    def _fill(self, state: State) -> None:
        """Give the replica the weights that are validated. Collective."""
        validation = state.config.validation
        use_ema = state.ema is not None and not (validation and validation.weights == "target")
        source = state.ema.full() if state.ema and use_ema else full_params(state.accelerator, state.model)
        self.replica.to(state.accelerator.device)
        own = dict(self.replica.named_parameters()) | dict(self.replica.named_buffers())
        with torch.no_grad():
            for name, tensor in source:
                own[name].copy_(tensor)

    def _negative_pictures(self, pictures: Sequence[Picture], state: State) -> list[Tensor]:
        if not len(state.negatives.nets) or not state.accelerator.is_main_process:
            return []
        net, device = state.negatives.nets[0], state.accelerator.device
        descriptor, validation = state.config.arch.descriptor, state.config.validation
        tile = validation.tile if validation else None
        with operator_by_operator():  # each picture has a size of its own
            shown = (infer(net, descriptor, picture.degraded[None].to(device), tile=tile)[0] for picture in pictures)
            return [image.float().clamp(0, 1).cpu() for image in shown]

    def _report(
        self,
        config: ValidationConfig,
        state: State,
        tracker: Tracker,
        results: dict[str, tuple[Scores, list[Picture]]],
    ) -> None:
        scale, num_pictures, table = state.config.arch.descriptor.scale, state.config.tracking.num_images, {}
        for name, (scores, pictures) in results.items():
            reference, reference_pictures = evaluate(
                baseline(scale), config.sets[name], scale, state.accelerator, num_pictures, metrics=config.metrics
            )
            table[name] = reference.without(scores.failed), scores.without(reference.failed)
            upscaled = {picture.key: picture for picture in reference_pictures}
            both = [(picture, upscaled[picture.key]) for picture in pictures if picture.key in upscaled]
            if state.accelerator.is_main_process and both:
                path: Path = tracker.run_dir / f"{name}.png"
                comparison_png(path, both)
                tracker.message(f"{name}: degraded | {'bicubic | ' if scale > 1 else ''}restored | clean in {path}")
        if state.accelerator.is_main_process:
            name, further = "bicubic" if scale > 1 else "degraded", [metric.label for metric in config.metrics]
            tracker.console.print(results_table(name, table, state.contrast_share, further))
