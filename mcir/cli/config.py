"""`mcir config …`: parsing only. Heavy imports are inside the commands, so that --help answers at once."""

from pathlib import Path
from typing import Annotated

import typer

from mcir.cli.arguments import Configs, split
from mcir.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Check, show and document configs.")


@app.command()
def check(files: Annotated[list[Path], typer.Argument(help="Each file is checked on its own.")]) -> None:
    """Check configs; every mistake of every file is reported."""
    from mcir.config import load

    faults = []
    if overrides := [str(file) for file in files if "=" in file.name and not file.exists()]:
        raise UserError(
            f"config check takes files, each on its own, and no {overrides[0]}: `mcir config show FILE... path=value` "
            "checks what they are together"
        )
    for file in files:
        try:
            load([file])
        except UserError as error:
            faults.append(str(error))
        else:
            print(f"{file}: ok")
    if faults:
        raise UserError("\n".join(faults))


@app.command()
def show(configs: Configs) -> None:
    """Print the resolved config: files merged, overrides applied, defaults filled in."""
    from mcir.config import dump, load

    print(dump(load(*split(configs))), end="")


@app.command()
def schema() -> None:
    """Print the JSON schema of a config."""
    import json

    from mcir.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=1))
