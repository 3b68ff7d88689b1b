"""Arguments that several commands take."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mcir.errors import UserError

Configs = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG... [path=value]...",
        help="YAML files, merged left to right, then overrides such as optim.optimizer.lr=1e-4.",
    ),
]


def _allow(max_pixels: int | None) -> None:
    if max_pixels is not None:
        from mcir.data.decode import allow

        allow(max_pixels)


MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        callback=_allow,
        help="Largest image that is read, in pixels; by default 89,478,485. More may be a decompression bomb.",
    ),
]


class ManyValues(TyperCommand):
    """Takes `--weights A B` for `--weights A --weights B`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = None
        for argument in args:
            if argument.startswith("-"):
                option = argument if argument in ("--weights", "--data", "--arch", "--arms", "--metrics") else None
            elif option and spread[-1] != option:
                spread.append(option)
            spread.append(argument)
        return super().parse_args(ctx, spread)


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Files and `path=value` overrides."""
    files = [argument for argument in arguments if "=" not in argument]
    if not files:
        raise UserError("name at least one config file, such as configs/quickstart.yaml")
    return files, [argument for argument in arguments if "=" in argument]


def tile_of(text: str | None) -> Any:
    if text is None or text == "auto":
        return text
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"--tile {text}: give a number of pixels or auto")
    return int(text)


def kind_of(text: str | None) -> Any:
    if text not in (None, "ema", "target"):
        raise UserError(f"--weights-kind {text}: give ema or target")
    return text
