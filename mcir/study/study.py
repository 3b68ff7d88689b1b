"""Arms by seeds, trained and compared: the logic of `mcir study`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from mcir.config import RunConfig, dump
from mcir.errors import UserError
from mcir.evaluation.report import require_writable, write_whole
from mcir.study.execute import Executor, execute, is_main
from mcir.study.plan import Equal, Plan, equal_steps, read_arms, save_steps, saved_steps, steps_in_equal_time
from mcir.study.plots import curves_png, differences_png
from mcir.study.report import to_json, to_markdown
from mcir.study.results import Results, collect

BENCH = ("--json", "--no-compare", "--steps", "30", "--rounds", "1")
NUM_TIMINGS = 2


def study(
    files: Sequence[str],
    overrides: Sequence[str],
    arms: Sequence[str],
    output: Path,
    *,
    num_seeds: int = 5,
    equal: Equal | None = None,
    jobs: int = 1,
    only: int | None = None,
    report_only: bool = False,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> int:
    """Trains what is not done yet, one run after the other, and reports; the exit code: 1 unless all are finished.

    `only`: that run alone, without a report. `dry_run`: says what there is to do. Collective under a launcher.
    UserError before the first run for whatever does not fit together.
    """
    if only is not None and report_only:
        raise UserError(f"--only {only} trains one run and --report-only reports on all: give one of the two")
    require_writable(output, folder=True)
    configs = read_arms(files, overrides, arms)
    with Executor() as executor:
        steps = equal_steps(configs, equal)
        if equal == "time":
            found = executor.on_main(lambda: saved_steps(output, configs))
            if found is None and (only is not None or report_only):
                raise UserError(
                    f"{output}: the arms' speeds are not known yet; run the same command with --dry-run once"
                )
            steps = found or _measure_steps(executor, configs, output)
        plan = Plan(configs, num_seeds, output, equal, steps)
        if only is not None and not only < len(plan.tasks):
            raise UserError(f"--only {only}: there are {len(plan.tasks)} runs, counted from 0")
        executor.on_main(plan.check)
        if dry_run:
            if is_main():
                for task in plan.tasks:
                    record = task.record
                    state = f"{record['state']} at step {record['step']}" if record else "not begun"
                    print(f"{task.index:3d} {task.name}  {task.config.steps} steps  {state}")
            return 0
        if not report_only:
            executor.on_main(plan.write)
            execute(executor, plan.tasks if only is None else [plan.tasks[only]], jobs, retry_failed)
        stopped = executor.stop_agreed()
    if not is_main():
        return stopped
    if only is None:
        report(collect(plan), output)
    considered = plan.tasks if only is None else [plan.tasks[only]]
    done = all(record is not None and record["state"] == "finished" for record in (t.record for t in considered))
    return stopped or int(not done)


def report(results: Results, output: Path) -> None:
    """Writes study.json, study.md, differences.png and curves.png, and prints what study.md says."""
    text = to_markdown(results)
    Console().print(Markdown(text))
    contents = {"study.json": to_json(results, sys.argv).encode(), "study.md": text.encode()}
    if results.lines:
        contents |= {"differences.png": differences_png(results), "curves.png": curves_png(results)}
    for name, content in contents.items():
        write_whole(output / name, content)
    print(f"{output}: {', '.join(contents)}")


def _measure_steps(executor: Executor, arms: Mapping[str, RunConfig], output: Path) -> dict[str, int]:
    """Steps for equal time: each arm is timed in turn, with its loader, and its fastest timing counts. Collective."""
    steps_in_equal_time(arms, dict.fromkeys(arms, 1.0))  # what does not fit is said before the timings
    fastest = dict.fromkeys(arms, 0.0)
    for i in range(NUM_TIMINGS):
        for name, config in arms.items():
            path, log = output / "configs" / f"{name}.yaml", output / "logs" / f"{name}.bench-{i}.log"
            if is_main():
                write_whole(path, dump(config).encode())
                log.unlink(missing_ok=True)
            executor.agree(None)
            outcomes = executor.start(["bench", str(path), *BENCH], log)
            if any(outcome["exit_code"] for outcome in outcomes):
                raise UserError(f"arm {name} could not be timed: see {log}")
            if is_main():
                fastest[name] = max(fastest[name], _images_per_s(log))
    steps = steps_in_equal_time(arms, executor.agree(fastest))
    if is_main():
        save_steps(output, arms, steps)
    return steps


def _images_per_s(log: Path) -> float:
    for line in log.read_text().splitlines():
        if line.startswith('{"name"'):
            return float(json.loads(line)["images_per_s"])
    raise UserError(f"{log}: holds no timing")
