"""Which settings train this network fastest on this device: the logic of `mcir bench --sweep`.

One setting after the other is tried beside the best so far and kept where it pays. Each trial is a process of its own,
so that a setting that does not fit or compile, or takes the process down, costs nothing but its row.
"""

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ruamel.yaml import YAML

from mcir.config import RunConfig

PAYS = 1.03
"""A setting is kept where images/s rise by more than this factor: less is noise."""
MAX_DOUBLINGS = 6
TRIAL_S = 300
"""Seconds for a setting: one that compiles for longer is given up."""


@dataclass(frozen=True)
class Trial:
    """One setting tried on top of those kept before it."""

    setting: dict[str, Any]  # field path -> value
    images_per_s: float | None
    ms: float | None
    memory_gib: float | None
    fault: str | None = None
    kept: bool = False

    def __str__(self) -> str:
        name = ", ".join(f"{path}={json.dumps(value)}" for path, value in self.setting.items()) or "as configured"
        if self.images_per_s is None:
            return f"{name}: {self.fault}"
        verdict = ": kept" if self.kept else ": does not pay" if self.setting else ""
        return f"{name}: {self.images_per_s:.4g} images/s, {self.ms:.4g} ms/step, {self.memory_gib:.3g} GiB{verdict}"


def sweep(config: RunConfig, arguments: Sequence[str], steps: int, rounds: int) -> Iterator[Trial]:
    """Trials as they end; the first is the config as it is. `arguments`: what `mcir bench` was given as configs."""
    measure = partial(_measure, [*arguments, "--steps", str(steps), "--rounds", str(rounds)])
    best = measure({})
    yield best
    if best.images_per_s is None:
        return
    fastest, kept = best.images_per_s, dict[str, Any]()
    for choices in _settings(config):
        for setting in choices:
            trial = measure(kept, setting)
            pays = trial.images_per_s is not None and trial.images_per_s > PAYS * fastest
            yield Trial(**{**vars(trial), "kept": pays})
            if not pays:
                break
            assert trial.images_per_s is not None
            fastest, kept = trial.images_per_s, kept | setting


def _measure(arguments: Sequence[str], kept: dict[str, Any], setting: dict[str, Any] | None = None) -> Trial:
    """Run `mcir bench` with the settings in a process."""
    overrides = [f"{path}={json.dumps(value)}" for path, value in (kept | (setting or {})).items()]
    command = [sys.executable, "-m", "mcir", "bench", *arguments, *overrides, "--json", "--no-compare"]
    limit = TRIAL_S if setting else None  # the config as it is takes what it takes
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return Trial(setting or {}, None, None, None, fault=f"given up after {TRIAL_S} s (compiling, most likely)")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}: out of memory?"]
        return Trial(setting or {}, None, None, None, fault=lines[-1][:200])
    result = json.loads(done.stdout)
    ms = result["compared_ms"]["mcir"]
    return Trial(setting or {}, 1e3 * result["batch_size"] / ms, ms, result["memory_gib"])


def overlay(trials: Sequence[Trial]) -> dict[str, Any]:
    """The settings that were kept, as values of a config."""
    values: dict[str, Any] = {}
    for trial in trials:
        for path, value in trial.setting.items() if trial.kept else ():
            section, _, field = path.rpartition(".")
            (values.setdefault(section, {}) if section else values)[field] = value
    return values


def dump(trials: Sequence[Trial]) -> str:
    """The overlay as YAML to name after the config: `mcir train CONFIG overlay.yaml`."""
    values, text = overlay(trials), io.StringIO()
    YAML().dump(values, text)
    last = [trial for trial in trials if trial.kept or trial is trials[0]][-1]
    header = f"# {last.images_per_s:.4g} images/s with these settings, {trials[0].images_per_s:.4g} without\n"
    if "batch_size" in values:
        header += "# The batch size changes what is trained: its learning rate is yours to choose.\n"
    return header + text.getvalue()


def _settings(config: RunConfig) -> list[list[dict[str, Any]]]:
    """What to try, in order; of a list the next is tried where the one before paid."""
    compute, descriptor = config.compute, config.arch.descriptor
    choices: list[list[dict[str, Any]]] = []
    if compute.precision != "bf16" and descriptor.bf16:
        choices.append([{"compute.precision": "bf16"}])
    channels_last = compute.channels_last
    if channels_last is None:  # as the engine takes it
        channels_last = descriptor.channels_last and torch.cuda.is_available()
    choices.append([{"compute.channels_last": not channels_last}])
    if torch.cuda.is_available() and not (compute.cuda_graphs or compute.checkpoint_activations):
        choices.append([{"compute.cuda_graphs": True}])
    if not compute.compile:
        choices.append([{"compute.compile": True}])
    sizes = [config.batch_size * 2**i for i in range(1, MAX_DOUBLINGS + 1)]
    return [*choices, [{"batch_size": size} for size in sizes]]
