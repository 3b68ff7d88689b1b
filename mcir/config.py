"""The manual of a run: every section and its fields, with `load`, which merges files and `path=value` overrides.

Files are YAML 1.2, merged left to right; a mapping whose `name` or `format` changes replaces the earlier one, lists
are replaced whole. Every mistake, at every depth, is reported at once with its path. The resolved config loads back
equal."""

import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from mcir.archs import AnyArch
from mcir.data.stages import Phase, Stage, phases
from mcir.data.stream import DataConfig
from mcir.errors import UserError
from mcir.evaluation.config import MEAN, ValidationConfig
from mcir.mistakes import explained
from mcir.objective.objective import ObjectiveConfig
from mcir.objective.pcl import PCLConfig
from mcir.objective.ratio import RatioConfig
from mcir.parallel.config import ComputeConfig
from mcir.section import TAGS, PathText, Section, parse_yaml, to_yaml
from mcir.train.config import CheckpointConfig, TrackingConfig, WatchConfig
from mcir.train.optim import OptimConfig, Segments

PCL_PIXEL = 32
"""Up to this crop the embedding of `pcl` ends in one pixel."""


class RunConfig(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run directory is runs_dir/name."""
    runs_dir: PathText = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Samples in an optimizer step, over all processes and micro-batches."""
    accumulate: PositiveInt | Literal["auto"] = 1
    """Micro-batches in an optimizer step. `auto`: as few as fit into memory by the plan of `--dry-run`; the run's own
    config and checkpoints hold the number."""
    stages: tuple[Stage, ...] = ()
    """Other crops and batches from a step on; data.crop_size and batch_size hold before the first."""
    arch: AnyArch
    init_from: PathText | None = None
    """Weights to start from (.safetensors, .pth, .pt, .ckpt, .pk); `net.pth[params_ema]` names an entry of the file.
    Also hf://owner/repo[/file][@revision], https://…#sha256=… and what fsspec opens, such as s3://bucket/file."""
    init_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the network's values that `init_from` must fill at least."""
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an EMA of the weights for evaluation, updated each step (not a negative); null: none."""
    ema_warmup: bool = True
    """Whether the decay rises to `ema_decay` as min(ema_decay, (1 + step) / (10 + step)), so that short runs do not
    average their initial weights. Published recipes go without: false."""
    validation: ValidationConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    watch: WatchConfig | None = WatchConfig()
    """null: the run goes on whatever happens, but for gradients that are not finite."""
    compute: ComputeConfig = ComputeConfig()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What a batch is at which steps."""
        return phases(self.batch_size, self.data.crop_size, self.stages)

    @property
    def num_micro_batches(self) -> int:
        """Of an optimizer step; one where it is still to be found out."""
        return 1 if self.accumulate == "auto" else self.accumulate

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if faults := _contradictions(self):
            raise ValueError(*faults)
        return self


def require_shared(config: RunConfig, world_sizes: Sequence[int]) -> None:
    """UserError unless each of these numbers of processes can share every micro-batch of the run equally."""
    places = ["batch_size", *(f"stages.{i}.batch_size" for i in range(len(config.stages)))]
    accumulate, faults = config.num_micro_batches, []
    for place, phase in zip(places, config.phases, strict=True):
        if unfit := [n for n in sorted(set(world_sizes)) if phase.batch_size % (accumulate * n)]:
            batch = f"{phase.batch_size}" + (f" in {accumulate} micro-batches" if accumulate > 1 else "")
            numbers, least = ", ".join(str(n) for n in unfit), accumulate * math.lcm(*world_sizes)
            faults.append(f"{place}: {batch} cannot be shared equally by {numbers} processes; multiples of {least} can")
        alone = phase.batch_size in [accumulate * n for n in world_sizes] and phase.crop_size <= PCL_PIXEL
        if alone and isinstance(config.objective.contrast, PCLConfig):
            faults.append(
                f"{place}: a process gets one sample at a time, of which pcl's embedding makes one pixel, at crops up "
                f"to {PCL_PIXEL}, and cannot normalise it: raise it, lower accumulate or enlarge data.crop_size"
            )
    if faults:
        raise UserError("\n".join(faults))


def _contradictions(run: Any, unsure: Collection[str] = ()) -> list[str]:
    """A line for each mistake that lies between fields. `run` has RunConfig's; those that are None are left out, and so
    is what would need to know `unsure` ones."""
    scale, data, validation = run.arch and run.arch.descriptor.scale, run.data, run.validation
    faults = []
    no_ema = run.ema_decay is None and "ema_decay" not in unsure
    no_validation = validation is None and "validation" not in unsure
    crops = {"data.crop_size": data.crop_size} if data else {}
    batches = {"batch_size": run.batch_size} if run.batch_size else {}
    after = 0
    for i, stage in enumerate(run.stages or ()):
        crops[f"stages.{i}.crop_size"], batches[f"stages.{i}.batch_size"] = stage.crop_size, stage.batch_size
        if run.steps and not after < stage.after < run.steps:
            limits = f"after step {after} and before the last, {run.steps}"
            faults.append(f"stages.{i}.after: {stage.after}, and it should begin {limits}")
        after = stage.after
    for place, crop_size in crops.items():
        if scale and crop_size % scale:
            faults.append(f"{place}: {crop_size} is no multiple of the network's scale {scale}")
    for place, batch_size in batches.items():
        if isinstance(run.accumulate, int) and batch_size % run.accumulate:
            faults.append(f"{place}: {batch_size} is no multiple of accumulate, {run.accumulate}")
    ends = run.optim.schedule.end if run.optim and isinstance(run.optim.schedule, Segments) else None
    if ends is not None and run.steps and ends < run.steps:
        faults.append(f"optim.schedule.pieces: the last ends at step {ends}, the run at {run.steps}")
    for term in run.objective.reconstruction if run.objective else ():
        for place, crop_size in crops.items():
            if term.min_side > crop_size:
                needed = f"{term.name} needs at least {term.min_side} pixels"
                faults.append(f"objective.reconstruction: {needed}, {place} is {crop_size}")
    places = [(f"data.train.{i}", source.degradation) for i, source in enumerate(data.train if data else ())]
    if validation:
        places += [(f"validation.sets.{name}", s.degradation) for name, s in validation.sets.items()]
        if validation.weights == "ema" and no_ema:
            faults.append("validation.weights: ema, but ema_decay is not set")
        if MEAN in validation.sets:
            faults.append(f"validation.sets.{MEAN}: that name is for the mean of the sets; call it otherwise")
        labels = ("psnr", "ssim", *(metric.label for metric in validation.metrics))
        metrics = [f"{name}/{metric}" for name in (*validation.sets, MEAN) for metric in labels]
        if validation.best is not None and validation.best not in metrics:
            faults.append(f"validation.best: no {validation.best}; there are {', '.join(metrics)}")
        if scale == 1 and any(data.protocol == "sr" for data in validation.sets.values()):
            faults.append("validation.sets: the protocol sr is for super-resolution; this network keeps the size")
    for place, degradation in places:
        if degradation is not None and scale and degradation.scale != scale:
            faults.append(f"{place}.degradation: its scale is {degradation.scale}, the network's is {scale}")
    contrast = run.objective and run.objective.contrast
    for k, schedule in enumerate(contrast.negatives if contrast else ()):
        if schedule.source == "ema" and no_ema:
            faults.append(f"objective.contrast.negatives.{k}.source: ema, but ema_decay is not set")
    if run.compute and run.compute.cuda_graphs and run.compute.checkpoint_activations:
        faults.append("compute.cuda_graphs: not with checkpoint_activations, which asks for the generator's state")
    if isinstance(contrast, RatioConfig) and contrast.curriculum and no_validation:
        faults.append("objective.contrast.curriculum: it goes by the validated PSNR, and there is no validation")
    for place, crop_size in crops.items() if isinstance(contrast, PCLConfig) else ():
        if crop_size % 2:
            faults.append(f"{place}: {crop_size}, and pcl needs an even one, which it halves")
    return faults


def load(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that files, merged left to right, and `path=value` overrides describe. UserError lists all mistakes."""
    merged: dict[str, Any] = {}
    for path in paths:
        for key, value in _read(Path(path)).items():
            merged[key] = _merge(merged.get(key), value)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UserError(f"{override}: an override is written path=value, such as optim.optimizer.lr=1e-4")
        _set(merged, path, parse_yaml(text, override))
    return validate(merged, " + ".join(map(str, paths)))


def validate(values: Mapping[str, Any], name: str) -> RunConfig:
    """The config from plain values; `name` says in messages where they come from."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines, wrong = explained(error, values, RunConfig)
        fields = {place[0] for place in wrong if place}
        lines += _contradictions(_right_part(_without(values, wrong)), fields) if wrong else []
        lines = [f"  {line}" for line in dict.fromkeys(lines)]
        raise UserError(f"{name}: {len(lines)} mistake{'s' if len(lines) > 1 else ''}\n" + "\n".join(lines)) from None


def _right_part(values: Mapping[str, Any]) -> types.SimpleNamespace:
    """The fields of a RunConfig that can be read; None for the others."""
    right = dict.fromkeys(RunConfig.model_fields)
    for name, field in RunConfig.model_fields.items():
        with suppress(ValidationError):
            kind: TypeAdapter[Any] = TypeAdapter(typing.cast(Any, field.annotation))
            right[name] = kind.validate_python(values[name]) if name in values else field.get_default()
    return types.SimpleNamespace(**{n: None if v is PydanticUndefined else v for n, v in right.items()})


def _without(node: Any, places: Iterable[tuple[Any, ...]]) -> Any:
    """The values without what lies at these places of mappings."""
    inside = [place for place in places if place]
    if isinstance(node, Mapping):
        return {
            key: _without(value, [place[1:] for place in inside if place[0] == key])
            for key, value in node.items()
            if (key,) not in inside
        }
    if isinstance(node, list | tuple):
        return [_without(v, [place[1:] for place in inside if place[0] == i]) for i, v in enumerate(node)]
    return node


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that `load` reads back equal."""
    return to_yaml(config.model_dump(mode="json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a mapping of fields")
    _require_names(values, str(path))
    return values


def _require_names(node: Any, place: str) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(node, dict) and not isinstance(key, str):
            raise UserError(f"{place}: {key!r} is no name of a field; write it in quotes where it is meant as text")
        _require_names(value, f"{place}: {key}")


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if any(tag in base and tag in over and base[tag] != over[tag] for tag in TAGS):
        return over  # another network, loss, source...: the earlier one's arguments are not its own
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node: Any = values
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, path)]
        elif isinstance(node, dict):
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
        else:
            raise UserError(f"{path}: {part} is inside a plain value")
    if isinstance(node, list):
        node[_index(node, last, path)] = value
    else:
        node[last] = _merge(node.get(last), value)


def _index(node: list[Any], part: str, path: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"{path}: {part} is no place in a list of {len(node)}")
    return int(part)
