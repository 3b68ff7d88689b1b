"""A study told: `study.json` with every number, `study.md` for a paper or a README, the same on the screen.

A difference is called one only where its interval leaves out zero; everywhere else it says that none is shown.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from mcir import __version__
from mcir.evaluation.report import jsonable
from mcir.study.results import NOT_BEGUN, Line, Results
from mcir.study.statistics import CONFIDENCE, POWER, seeds_needed

EFFECT_DB = 0.02
"""The PSNR difference for which the seeds that it takes are told."""
DIGITS = {"psnr": 3, "ssim": 5}
UNITS = {"psnr": " dB"}


def to_json(results: Results, command: Sequence[str]) -> str:
    """Everything that the tables are made of."""
    plan = results.plan
    content = {
        "version": __version__,
        "command": list(command),
        "equal": plan.equal,
        "confidence": CONFIDENCE,
        "first": plan.first,
        "arms": {
            arm: {"steps": plan.steps[arm], "changes": plan.changes(arm)}
            | dict(zip(("images_per_s", "hours"), results.cost(arm), strict=True))
            for arm in plan.arms
        },
        "runs": [
            {
                "name": run.task.name,
                "arm": run.task.arm,
                "seed": run.task.seed,
                "state": run.state,
                "message": run.message,
                "step": run.step,
                "images_per_s": run.images_per_s,
                "hours": run.hours,
                "on_gpu": run.on_gpu,
                "scores": {name: found.mean() for name, found in (run.scores or {}).items()},
            }
            for run in results.runs
        ],
        "results": [
            {
                "set": line.data,
                "metric": line.metric,
                "arm": line.arm,
                "seeds": line.num_seeds,
                "mean": line.mean,
                "deviation": line.deviation,
                "difference": None
                if line.comparison is None
                else vars(line.comparison) | {"is_shown": line.comparison.is_shown},
                f"seeds_for_{EFFECT_DB}_db": _seeds(line),
            }
            for line in results.lines
        ],
    }
    return json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n"


def to_markdown(results: Results) -> str:
    """The tables, the outcome in sentences, and how to read them."""
    plan = results.plan
    config = plan.arms[plan.first]
    steps = sorted(set(plan.steps.values()))
    parts = [
        f"# {config.name}: {', '.join(plan.arms)}",
        f"{config.arch.name}, {' to '.join(map(str, steps[:1] + steps[1:][-1:]))} steps of {config.batch_size}, "
        f"{plan.num_seeds} seeds, paired; differences are from `{plan.first}`"
        + (" in equal training time." if plan.equal == "time" else "."),
    ]
    for metric in dict.fromkeys(line.metric for line in results.lines):
        arrow = " ↓" if metric in plan.lower_is_better else ""
        parts.append(_table([line for line in results.lines if line.metric == metric], arrow))
    parts += [_cost_table(results), "\n".join(f"- {sentence}" for sentence in sentences(results)), _notes(results)]
    return "\n\n".join(parts) + "\n"


def sentences(results: Results) -> list[str]:
    """The outcome: what is shown, what is not, what has not run."""
    told = []
    for line in results.lines:
        found = line.comparison
        if found is None or not found.is_shown:
            continue
        lower = line.metric in results.plan.lower_is_better
        direction = "better" if (found.mean < 0) == lower else "worse"
        told.append(
            f"{line.data}, {line.metric.upper()}: `{line.arm}` is {direction} than `{results.plan.first}` by "
            f"{abs(found.mean):.{_digits(line)}f}{UNITS.get(line.metric, '')} {_interval(found.low, found.high, line)}."
        )
    quiet: dict[tuple[str, str], list[str]] = {}
    for line in results.lines:
        found = line.comparison
        if found is not None and not found.is_shown:
            verdict = "no difference is shown" if found.num_seeds > 1 else "one seed cannot tell a difference"
            quiet.setdefault((line.arm, verdict), []).append(f"{line.data} {line.metric.upper()}")
    told += [f"`{arm}`: {verdict} on {', '.join(where)}." for (arm, verdict), where in quiet.items()]
    for run in results.runs:
        if run.state not in ("finished", NOT_BEGUN):
            message = f": {run.message.splitlines()[0]}" if run.message else ""
            told.append(f"`{run.task.name}` is not in the tables: {run.state} at step {run.step}{message}")
    if waiting := sum(run.state == NOT_BEGUN for run in results.runs):
        told.append(f"{waiting} of {len(results.runs)} runs have not begun.")
    return told


def _table(lines: Sequence[Line], arrow: str) -> str:
    name = f"{lines[0].metric.upper()}{', dB' if lines[0].metric in UNITS else arrow}"
    head = ["set", "arm", "seeds", name, f"difference [{CONFIDENCE:.0%}]", "p (t)", "p (signs)", "seeds and images"]
    head += [f"seeds for {EFFECT_DB} dB"] if lines[0].metric in UNITS else []
    rows = []
    for i, line in enumerate(lines):
        digits, found = _digits(line), line.comparison
        spread = f" ± {line.deviation:.{digits}f}" if math.isfinite(line.deviation) else ""
        row = [
            line.data if i == 0 or lines[i - 1].data != line.data else "",
            line.arm,
            str(line.num_seeds),
            f"{line.mean:.{digits}f}{spread}",
        ]
        if found is None:
            row += ["", "", "", ""]
        else:
            star = " *" if found.is_shown else ""
            row += [
                f"{found.mean:+.{digits}f} {_interval(found.low, found.high, line)}{star}",
                _p(found.p_t),
                _p(found.p_signs),
                _interval(found.bootstrap_low, found.bootstrap_high, line),
            ]
        if line.metric in UNITS:
            seeds = _seeds(line)
            row.append("" if seeds is None else str(seeds))
        rows.append(row)
    return _markdown(head, rows)


def _cost_table(results: Results) -> str:
    hours_of = "GPU hours" if any(run.on_gpu for run in results.runs) else "CPU hours"
    rows = []
    for arm in results.plan.arms:
        speed, hours = results.cost(arm)
        finished = sum(run.state == "finished" for run in results.of(arm))
        rows.append(
            [
                arm,
                f"{finished} of {results.plan.num_seeds}",
                str(results.plan.steps[arm]),
                "" if speed is None else f"{speed:.1f}",
                "" if hours is None else f"{hours:.3g}",
            ]
        )
    return _markdown(["arm", "finished", "steps", "images/s", hours_of], rows)


def _notes(results: Results) -> str:
    seeds = results.plan.num_seeds
    return (
        "±: standard deviation over seeds. Difference: mean over pairs of runs with one seed, with Student's interval; "
        f"*: it leaves out zero. p (signs): sign-flip permutation, no less than {2 / 2**seeds:.2g} with {seeds} seeds. "
        "Seeds and images: percentile bootstrap over both, which is too narrow for few seeds. Seeds for "
        f"{EFFECT_DB} dB: what a paired t test needs to see that much with probability {POWER}, given the spread seen. "
        "Where nothing differs, one interval in twenty leaves out zero by chance."
    )


def _interval(low: float, high: float, line: Line) -> str:
    digits = _digits(line)
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]" if math.isfinite(low) else "[too few seeds]"


def _seeds(line: Line) -> int | None:
    return seeds_needed(line.comparison.deviation, EFFECT_DB) if line.comparison and line.metric in UNITS else None


def _digits(line: Line) -> int:
    return DIGITS.get(line.metric, 4)


def _p(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
