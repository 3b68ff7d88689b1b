"""`mcir study`: parsing only. Heavy imports are inside the command, so that --help answers at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mcir.cli.arguments import Configs, split
from mcir.errors import UserError


def study(
    configs: Configs,
    arms: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]YAML...",
            help="What is compared: each is merged over the config (A.yaml+B.yaml: both). The first is the reference.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Holds the runs and the report; given again, goes on.")],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each arm, with seed, seed + 1, ...")] = 5,
    equal: Annotated[
        str | None,
        typer.Option(
            metavar="steps|time", help="All arms train the first one's steps, or as many as take its time (measured)."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side on this machine.")] = 1,
    only: Annotated[
        int | None, typer.Option(min=0, metavar="I", help="Only run I, as a task of a Slurm array; see --dry-run.")
    ] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Report on the runs as they are.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Go on with runs that have failed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs with number and state.")] = False,
) -> None:
    """Train every arm with every seed and say which differences are real. Exit code 1 if a run failed or is missing."""
    from mcir.study.study import study as run

    if equal not in (None, "steps", "time"):
        raise UserError(f"--equal {equal}: give steps or time")
    kind: Any = equal
    code = run(
        *split(configs),
        arms,
        output,
        num_seeds=seeds,
        equal=kind,
        jobs=jobs,
        only=only,
        report_only=report_only,
        retry_failed=retry_failed,
        dry_run=dry_run,
    )
    raise typer.Exit(code)
