"""What a checkpoint holds of a run: out of its parts and back into them, whatever strategy and number of processes
wrote it."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor, nn

from mcir.config import RunConfig, dump
from mcir.data.loader import Loader
from mcir.errors import UserError
from mcir.evaluation.config import MEAN, ValidationConfig
from mcir.objective.negatives import Negatives, checksums
from mcir.objective.objective import Objective
from mcir.parallel.accelerator import strategy
from mcir.parallel.scaling import LossScale
from mcir.parallel.shards import full_moments, full_params, load_full_moments, load_full_params
from mcir.section import parse_yaml
from mcir.train.checkpoint import Checkpoint, Checkpointer, to_cpu
from mcir.train.ema import EMA
from mcir.train.watch import Watch

log = logging.getLogger(__name__)


@dataclass
class State:
    """All of a run that changes."""

    accelerator: Accelerator
    config: RunConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    negatives: Negatives
    objective: Objective
    ema: EMA | None
    loader: Loader
    step: int = 0
    """Optimizer steps made."""
    skipped_in_a_row: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Steps up to this one that were skipped because the gradient was not finite; on the device, equal on all ranks."""
    watch: Watch | None = None
    loss_scale: LossScale | None = None
    """Where the run computes in fp16."""
    best: tuple[float, str] | None = None
    """Value of the deciding metric, and the checkpoint that reached it."""
    owes_validation: bool = False
    """Whether the run was stopped where a validation was due, which is made when it goes on."""
    contrast_share: float | None = None
    """The contrast over the reconstruction loss, at the last log step."""
    measured: dict[str, float] = field(default_factory=dict)
    """Of the weights as they are now, for the files' metadata."""

    def save(self, checkpointer: Checkpointer) -> Path:
        """Copy this moment to the CPU and have it written beside the training; the path that it will have. Collective.

        The copy is all that is written, so the steps that follow change nothing of it. There is one at a time: until it
        is written, a rank holds its share of the checkpoint (rank 0 all but the others' moments) in memory.
        """
        begun = time.perf_counter()
        checkpointer.join()
        accelerator, files = self.accelerator, dict[str, dict[str, Tensor]]()
        self._require_equal()
        main = accelerator.is_main_process
        model = _collect(full_params(accelerator, self.model), main)
        ema = _collect(self.ema.full(), main) if self.ema else {}
        if main:
            files = {"model.safetensors": model} | ({"ema.safetensors": ema} if ema else {})
            if len(self.negatives.nets):
                files["negatives.safetensors"] = _collect(self.negatives.nets.state_dict().items(), main)
            if followed := self.followed():
                files["followed.safetensors"] = _collect(followed.items(), main)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        mine: dict[str, Tensor] = {}
        for i, (key, tensor) in enumerate(full_moments(accelerator, self.model, self.optimizer)):
            if i % world_size == rank:
                mine[key] = to_cpu(tensor)
        files[f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"] = mine
        skipped_in_a_row = int(self.skipped_in_a_row)
        state = {
            "step": self.step,
            "skipped_in_a_row": skipped_in_a_row,
            "healthy": not (skipped_in_a_row or (self.watch and self.watch.in_trouble)),
            "position": self.loader.position,
            "order": self.loader.order,
            "best": self.best,
            "owes_validation": self.owes_validation,
            "num_skipped": self.num_skipped(),
            "loss_scale": self.loss_scale.state() if self.loss_scale else None,
            "strategy": strategy(accelerator),
            "world_size": world_size,
        }
        config = self.config.model_dump(mode="json")
        metadata = {"arch": json.dumps(config["arch"]), "config": json.dumps(config), "step": str(self.step)}
        metadata |= {"metrics": json.dumps(self.measured)} if self.measured else {}

        def texts() -> dict[str, str]:
            state["healthy"] = state["healthy"] and all(bool(t.isfinite().all()) for t in model.values())
            return {"state.json": json.dumps(state), "config.yaml": dump(self.config)}

        best = checkpointer.folder / self.best[1] if self.best and self.config.checkpoint.keep_best else None
        path = checkpointer.save(self.step, files, texts, metadata, best)
        checkpointer.times["save_stall_s"] = time.perf_counter() - begun
        return path

    def _require_equal(self) -> None:
        """Collective. RuntimeError, which is a bug of ours, names the tensors that ranks hold differently."""
        if self.accelerator.num_processes == 1:
            return
        whole = {f"negatives.{key}": tensor for key, tensor in self.negatives.nets.state_dict().items()}
        whole |= self.followed()
        if not whole:
            return  # NCCL gathers nothing of no size
        own = checksums(tensor.to(self.accelerator.device) for tensor in whole.values())
        sums = self.accelerator.gather(own.to(self.accelerator.device)[None])  # (ranks, tensors)
        differ = (sums != sums[0]).any(0).tolist()
        if names := [name for name, wrong in zip(whole, differ, strict=True) if wrong]:
            raise RuntimeError(f"ranks differ at step {self.step} in {', '.join(names[:8])}")

    def load(self, checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]) -> None:
        """Continue from a checkpoint, which must hold tensors of these whole shapes. Collective."""
        state: dict[str, Any] = checkpoint.state
        model, moments = checkpoint.reader("model.safetensors"), checkpoint.reader("optimizer-*.safetensors")
        for key, shape in shapes.items():
            saved = _strict(model, checkpoint)(key).shape
            if saved != shape:
                raise UserError(
                    f"{checkpoint.path}: {key} has another shape, {list(saved)}, than the network's {list(shape)}"
                )
        nets, negatives = self.negatives.nets, checkpoint.reader("negatives.safetensors")
        num_saved = next(k for k in count() if negatives(f"{k}.{next(iter(shapes))}") is None)
        if num_saved != len(nets):
            raise UserError(
                f"{checkpoint.path} holds {num_saved} negatives, and objective.contrast.negatives {len(nets)}: change "
                "them back, or start another run from the checkpoint's weights (init_from)"
            )
        load_full_params(self.accelerator, self.model, _strict(model, checkpoint))
        load_full_moments(self.accelerator, self.model, self.optimizer, moments)
        if self.ema:
            has_ema = (checkpoint.path / "ema.safetensors").exists()
            ema = checkpoint.reader("ema.safetensors") if has_ema else model
            self.ema.load(_strict(ema, checkpoint))
        nets.load_state_dict({key: _strict(negatives, checkpoint)(key) for key in nets.state_dict()})
        saved_state = checkpoint.reader("followed.safetensors")
        for key, tensor in self.followed().items():  # where another contrast was trained, it begins here
            if (followed := saved_state(key)) is not None and followed.shape == tensor.shape:
                tensor.copy_(followed)
        self.step, self.loader.position, self.loader.order = state["step"], state["position"], state["order"]
        if self.loader.position != self.loader.position_after(self.step):
            raise UserError(
                f"{checkpoint.path}: {self.loader.position} samples were taken in {self.step} steps, and with this "
                f"batch_size and these stages it would be {self.loader.position_after(self.step)}: change them back, "
                "or start another run from the checkpoint's weights (init_from)"
            )
        self.owes_validation = state.get("owes_validation", False)
        self.loader.num_skipped = state["num_skipped"] if self.accelerator.is_main_process else 0
        self.skipped_in_a_row.fill_(state.get("skipped_in_a_row", 0))
        if self.loss_scale and state.get("loss_scale"):
            self.loss_scale.load(state["loss_scale"])
        same = state["best"] and decides_best(_validation_of(checkpoint)) == decides_best(self.config.validation)
        if state["best"] and not same and self.accelerator.is_main_process:
            log.warning("validation.best was of another metric, set or kind of weights: the best starts anew")
        self.best = tuple(state["best"]) if same else None

    def followed(self) -> dict[str, Tensor]:
        """What else changes as the run goes, all on every rank: to be overwritten in place."""
        watched = self.watch.state() if self.watch else {}
        return {**self.objective.state(), **self.negatives.state(), **watched}

    def num_skipped(self) -> int:
        """Rows left out by all ranks. Collective."""
        own = torch.tensor([self.loader.num_skipped], device=self.accelerator.device)
        return int(self.accelerator.gather(own).sum())


def decides_best(validation: ValidationConfig | None) -> Any:
    """All that a value of the deciding metric is compared by: values of another one are no better or worse."""
    if validation is None:
        return None
    metric = validation.best or f"{next(iter(validation.sets))}/psnr"
    where = metric.rsplit("/", 1)[0]
    return metric, validation.weights, validation.sets if where == MEAN else validation.sets.get(where)


def _validation_of(checkpoint: Checkpoint) -> ValidationConfig | None:
    """The section of the run that saved it; None also where this version no longer reads it."""
    with suppress(OSError, UserError, ValidationError, LookupError, TypeError):
        section = parse_yaml((checkpoint.path / "config.yaml").read_text(), "config.yaml")["validation"]
        return ValidationConfig.model_validate(section) if section else None
    return None


def _collect(whole: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU of all tensors, or, on ranks that only take part in gathering them, nothing."""
    collected = {}
    for key, tensor in whole:
        if keep:
            collected[key] = to_cpu(tensor)
    return collected


def _strict(read: Callable[[str], Tensor | None], checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    def get(key: str) -> Tensor:
        tensor = read(key)
        if tensor is None:
            raise UserError(f"{checkpoint.path} has no {key}: it was saved by a run with another network")
        return tensor

    return get
