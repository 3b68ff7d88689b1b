"""The command line: parsing only. Heavy imports are inside the commands, so that --help answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mcir.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
config_app = typer.Typer(no_args_is_help=True, help="Check, show and document configs.")
app.add_typer(config_app, name="config")

Configs = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG... [path=value]...",
        help="YAML files, merged left to right, then overrides such as optim.optimizer.lr=1e-4.",
    ),
]


@app.callback()
def _root() -> None:
    """Train image-restoration networks against their own history."""


@app.command()
def train(
    configs: Configs,
    resume: Annotated[
        str,
        typer.Option(
            help="never: a new run directory. auto: go on with the newest checkpoint, or begin. PATH: that run's."
        ),
    ] = "never",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved config and what each process would hold; start nothing."),
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --dry-run: the number of processes to plan for.")] = 2,
) -> None:
    """Train a network. Use `accelerate launch --config_file launch/accelerate/NAME.yaml -m mcir train …` for
    several processes."""
    from mcir.config import dump, load

    config = load(*_split(configs))
    if dry_run:
        from rich.console import Console

        from mcir.memory import table

        print(dump(config), end="")
        Console().print(table(config, processes))
        return
    from mcir.engine import build_engine

    engine = build_engine(config, resume)
    exit_code = engine.fit()
    engine.accelerator.end_training()
    raise typer.Exit(exit_code)


@config_app.command()
def check(files: Annotated[list[Path], typer.Argument(help="Each file is checked on its own.")]) -> None:
    """Check configs; every mistake of every file is reported."""
    from mcir.config import load

    faults = []
    for file in files:
        try:
            load([file])
        except UserError as error:
            faults.append(str(error))
        else:
            print(f"{file}: ok")
    if faults:
        raise UserError("\n".join(faults))


@config_app.command()
def show(configs: Configs) -> None:
    """Print the resolved config: files merged, overrides applied, defaults filled in."""
    from mcir.config import dump, load

    print(dump(load(*_split(configs))), end="")


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a config."""
    import json

    from mcir.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=1))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Files and `path=value` overrides."""
    files = [argument for argument in arguments if "=" not in argument]
    if not files:
        raise UserError("name at least one config file, such as configs/quickstart.yaml")
    return files, [argument for argument in arguments if "=" in argument]


def main() -> None:
    """Run the command line; a mistake of the user's ends with one sentence and exit code 1."""
    try:
        app()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"mcir: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        sys.exit(1)
