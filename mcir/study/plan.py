"""What a study trains: every arm with every seed, each an ordinary run of its own.

An arm is the study's config with a file or two merged over it. Invariants: arms differ in nothing that would make their
pictures or their start unequal (network, data, batch, sets to measure on), so that runs with the same seed are pairs:
the same initial weights, the same samples in the same order. Runs are ordered seed by seed: a study that is stopped
half-way holds whole pairs, and more seeds later leave the numbers of the earlier runs as they are.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mcir.config import RunConfig, dump, load
from mcir.errors import UserError
from mcir.evaluation.report import write_whole
from mcir.train import record

Equal = Literal["steps", "time"]
COMMON = ("arch", "init_from", "data", "batch_size", "stages", "validation")
"""Sections in which arms must agree."""
WITHOUT_EFFECT = ("name", "runs_dir", "checkpoint", "tracking")
"""Sections in which a run that exists may differ from what is asked for now."""


@dataclass(frozen=True)
class Task:
    """One run of the study."""

    index: int
    arm: str
    seed: int
    config: RunConfig
    output: Path

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def run_dir(self) -> Path:
        return self.output / "runs" / self.name

    @property
    def config_path(self) -> Path:
        """The whole config: `mcir train` on it with `--resume auto` is what the study does."""
        return self.output / "configs" / f"{self.name}.yaml"

    @property
    def record(self) -> dict[str, Any] | None:
        """Its `run.json`; None before it was begun."""
        return record.read(self.run_dir)[0] if (self.run_dir / record.FILE).exists() else None


@dataclass(frozen=True)
class Plan:
    """The arms and the runs of a study."""

    arms: Mapping[str, RunConfig]
    """By name, as merged, in the order given: the first is what the others are compared with."""
    num_seeds: int
    output: Path
    equal: Equal | None
    steps: Mapping[str, int]
    """Optimizer steps of each arm."""

    @cached_property
    def tasks(self) -> list[Task]:
        made: list[Task] = []
        for offset in range(self.num_seeds):
            for arm, config in self.arms.items():
                seed = config.seed + offset
                own = {"name": f"{arm}.seed{seed}", "runs_dir": str(self.output / "runs"), "seed": seed}
                config = config.model_copy(update={**own, "steps": self.steps[arm]})
                made.append(Task(len(made), arm, seed, config, self.output))
        return made

    @property
    def first(self) -> str:
        return next(iter(self.arms))

    @property
    def lower_is_better(self) -> frozenset[str]:
        """The metrics of which less is better."""
        validation = self.arms[self.first].validation
        return validation.lower_is_better if validation else frozenset()

    def changes(self, arm: str) -> dict[str, Any]:
        """Path -> value of what this arm has otherwise than the first one."""
        first = self.arms[self.first].model_dump(mode="json")
        return {path: new for path, _, new in differences(first, self.arms[arm].model_dump(mode="json"))}

    def check(self) -> None:
        """UserError where a run that exists was trained with other settings than the plan's."""
        for task in self.tasks:
            earlier = task.run_dir / "config.yaml"
            if earlier.exists() and earlier.read_text() != dump(task.config):
                old, new = (c.model_dump(mode="json") for c in (load([earlier]), task.config))
                found = [d for d in differences(old, new) if d[0].split(".")[0] not in WITHOUT_EFFECT]
                if found:
                    raise UserError(
                        f"{task.run_dir} was trained with other settings ({_shown(found)}): give another --output"
                    )

    def write(self) -> None:
        """The config of each run."""
        for task in self.tasks:
            write_whole(task.config_path, dump(task.config).encode())


def read_arms(files: Sequence[str], overrides: Sequence[str], places: Sequence[str]) -> dict[str, RunConfig]:
    """Arms by name, checked against the first. A place is [NAME=]FILE or [NAME=]FILE+FILE…, merged over `files`;
    `path=value` overrides come last. UserError: fewer than two, two of one name, or arms that cannot be compared."""
    arms: dict[str, RunConfig] = {}
    for place in places:
        given, equals, text = place.partition("=")
        own = (text if equals else place).split("+")
        name = given if equals else Path(own[0]).stem
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise UserError(f"--arms {place}: {name!r} is no name of letters, digits, - and _; write NAME={own[0]}")
        if name in arms:
            raise UserError(f"--arms {place}: two arms are called {name}; give one another name, NAME={own[0]}")
        arms[name] = load([*files, *own], overrides)
    if len(arms) < 2:
        raise UserError("--arms: give at least two, such as configs/contrasts/plain.yaml configs/contrasts/spn.yaml")
    first, reference = next(iter(arms.items()))
    for name, config in arms.items():
        if config.validation is None:
            raise UserError(f"arm {name}: has no validation section, so there is nothing to compare")
        for section in (*COMMON, "seed"):
            old, new = ({section: c.model_dump(mode="json")[section]} for c in (reference, config))
            found = list(differences(old, new))
            if found:
                raise UserError(f"arm {name} cannot be compared with {first}: they differ in {_shown(found)}")
        if (mine := _measured(config)) != (other := _measured(reference)):
            raise UserError(
                f"arm {name} cannot be compared with {first}: {mine} are measured of it, and {other} of {first}; give "
                "validation.weights=target, or the same ema_decay to both"
            )
    return arms


def _measured(config: RunConfig) -> str:
    """Which weights the sets are measured with: an average is another network than the one that was trained."""
    target = config.ema_decay is None or (config.validation is not None and config.validation.weights == "target")
    warmup = "" if config.ema_warmup else " without warmup"
    return "the trained weights" if target else f"the averages of decay {config.ema_decay}{warmup}"


def equal_steps(arms: Mapping[str, RunConfig], equal: Equal | None) -> dict[str, int]:
    """The steps of each arm: those they have, or with `equal`: `steps` those of the first arm. UserError if they
    differ and nothing was said."""
    first = next(iter(arms.values())).steps
    for name, config in arms.items():
        if equal is None and config.steps != first:
            raise UserError(
                f"arm {name} trains {config.steps} steps, the first one {first}: give --equal steps (the first arm's) "
                "or --equal time (as many as take the first arm's time)"
            )
    return dict.fromkeys(arms, first)


def steps_in_equal_time(arms: Mapping[str, RunConfig], images_per_s: Mapping[str, float]) -> dict[str, int]:
    """As many steps as take the time that the first arm needs for its own. UserError for a learning rate that would
    not come down with fewer steps."""
    first, reference = next(iter(arms.items()))
    for name, config in arms.items():
        schedule, contrast = config.optim.schedule, config.objective.contrast
        if schedule.name in ("multistep", "segments") or getattr(schedule, "period", None):
            raise UserError(
                f"arm {name}: optim.schedule names steps of its own, which --equal time would leave behind; use cosine "
                "without a period, or constant"
            )
        staged = contrast is not None and any(isinstance(n.update_every, tuple) for n in contrast.negatives)
        if config.stages or staged:
            place = "stages" if config.stages else "objective.contrast.negatives"
            raise UserError(f"arm {name}: {place} names steps of its own, which --equal time would leave behind")
    return {name: max(1, round(reference.steps * images_per_s[name] / images_per_s[first])) for name in arms}


def saved_steps(output: Path, arms: Mapping[str, RunConfig]) -> dict[str, int] | None:
    """What an earlier start found for `--equal time`; None if there is nothing for these arms. UserError where it was
    for other settings."""
    file = output / "steps.json"
    try:
        saved = json.loads(file.read_text())
        steps, configs = saved["steps"], saved["arms"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: cannot be read ({error!r}); restore it or give another --output") from None
    if not arms.keys() <= steps.keys():
        return None
    for name, config in arms.items():
        if found := list(differences(configs[name], _of_effect(config))):
            raise UserError(
                f"{file}: arm {name} was timed with other settings ({_shown(found)}): give another --output"
            )
    return {name: int(steps[name]) for name in arms}


def save_steps(output: Path, arms: Mapping[str, RunConfig], steps: Mapping[str, int]) -> None:
    """For `saved_steps`."""
    content = {"steps": dict(steps), "arms": {name: _of_effect(config) for name, config in arms.items()}}
    write_whole(output / "steps.json", (json.dumps(content, indent=1) + "\n").encode())


def _of_effect(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of the values in which two configs, as plain values, differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("name") == new.get("name"):
        for key in dict.fromkeys((*old, *new)):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield path, old, new


def _shown(found: Sequence[tuple[str, Any, Any]]) -> str:
    """Where they differ, in a few words."""
    path, old, new = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{path}: {_short(new)}, not {_short(old)}{more}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
