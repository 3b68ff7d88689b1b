"""`mcir init`: parsing only. Heavy imports are inside the command, so that --help answers at once."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK",
            help="One of ours (edsr, swinir:light, nafnet, …), a name of spandrel's (HAT, …) or '{name: …, …}'.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Parquet shards, pairs of folders (hr and lr, gt and lq, sharp and blur, …), a published dataset as "
            "it unpacks, or clean images; `train` and `valid` or `test` inside or beside it are told apart.",
        ),
    ],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="By default NETWORK_FOLDER.yaml, here.")] = None,
    scale: Annotated[int | None, typer.Option(min=1, help="Of clean images, and where a folder has several.")] = None,
    degradation: Annotated[
        str | None, typer.Option(metavar="YAML", help="Of clean images, such as '{name: noise, sigma: 25}'.")
    ] = None,
) -> None:
    """Write a short config for data of your own, which trains as it is."""
    from mcir.recipes.own import init as write

    for line in write(network, data, output, scale, degradation):
        print(line)
