"""`mcir data …`: parsing only. Heavy imports are inside the commands, so that --help answers at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mcir.cli.arguments import MaxPixels
from mcir.errors import UserError

if TYPE_CHECKING:
    from mcir.data.pairs import Fault, Pairs

app = typer.Typer(no_args_is_help=True, help="Pack and inspect datasets.")

Layout = Annotated[
    str | None, typer.Option(help="Name of a published dataset's layout; SOURCE is where it was unpacked.")
]
Degraded = Annotated[Path | None, typer.Option(help="Folder of degraded images with the names of those in SOURCE.")]
Pattern = Annotated[
    str,
    typer.Option(help="Names of degraded images, '{key}x4.png'; with *, '{key}_*', many belong to one clean image."),
]
CleanPattern = Annotated[str, typer.Option(help="Names of clean images, where --pattern says what they share.")]
Split = Annotated[str | None, typer.Option(help="Part of a layout that has several, such as train or test.")]
Further = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="NAME=FOLDER",
        help="Further images of clean's size, named as the samples' keys or degraded images; as often as needed.",
    ),
]
Scale = Annotated[int, typer.Option(min=1, help="Clean side / degraded side; 1 where they are equal.")]

_SPLITS: dict[str, Literal["train", "validation", "test"]] = {  # what a layout or a user calls a part -> the Hub
    "train": "train",
    "valid": "validation",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Folder of clean images, or of a published dataset (--layout).")],
    output: Annotated[Path, typer.Argument(help="Folder for the Parquet shards and their README.md.")],
    layout: Layout = None,
    degraded: Degraded = None,
    pattern: Pattern = "{key}",
    clean_pattern: CleanPattern = "{key}",
    split: Annotated[str | None, typer.Option(help="Part of a layout that has several; also names the shards.")] = None,
    scale: Scale = 1,
    column: Further = None,
    crop_size: Annotated[
        int | None, typer.Option(help="Cut clean images into squares of this side (DIV2K: 480).")
    ] = None,
    crop_step: Annotated[int | None, typer.Option(help="Distance of neighbouring squares (DIV2K: 240).")] = None,
    crop_format: Annotated[str, typer.Option(help="png, or webp: lossless too, smaller, slower to write.")] = "png",
    seed: Annotated[int, typer.Option(min=-1, help="Of the row shuffling; -1 keeps the order of the files.")] = 0,
    num_shards: Annotated[int | None, typer.Option(help="Number of shards, instead of --shard-mib.")] = None,
    shard_mib: Annotated[int, typer.Option(help="Size of a shard.")] = 256,
    degradation: Annotated[
        str | None, typer.Option(help="Makes degraded images of clean ones, such as '{name: bicubic, scale: 4}'.")
    ] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes.")] = 4,
    max_pixels: MaxPixels = None,
    push: Annotated[str | None, typer.Option(help="Dataset repository of the Hub to upload it to, owner/name.")] = None,
    private: Annotated[bool, typer.Option(help="Where --push makes the repository.")] = False,
) -> None:
    """Write image folders as the Parquet shards that training and evaluation stream. Interrupted, it continues."""
    from pyarrow.parquet import read_metadata

    from mcir.data.options import Options
    from mcir.data.pack import pack as write

    if split and split not in _SPLITS:
        raise UserError(f"--split {split}: choose train, validation or test, or one that the --layout has")
    if crop_format not in ("png", "webp"):
        raise UserError(f"--crop-format {crop_format}: choose png or webp")
    pairs = _pairs(source, layout, degraded, split, scale, (pattern, clean_pattern), column)
    options = Options(
        crop_size=crop_size,
        crop_step=crop_step,
        crop_format="webp" if crop_format == "webp" else "png",
        seed=None if seed < 0 else seed,
        num_shards=num_shards,
        shard_bytes=shard_mib * 2**20,
        degradation=_degradation(degradation),
        split=_SPLITS[split] if split else pairs.split,
    )
    if private and not push:
        raise UserError("--private goes with --push")
    if push:
        from mcir.data.push import prepare

        options.check(pairs)
        prepare(push, options.split, private)
    if pairs.note:
        print(f"{pairs.title}: {pairs.note}")
    for line in pairs.left_out.lines():
        print(f"left out: {line}")
    shards = write(pairs, output, options, num_workers)
    num_rows = sum(read_metadata(shard).num_rows for shard in shards)
    print(f"{output}: {num_rows} samples in {len(shards)} shard{'s' if len(shards) > 1 else ''}")
    if push:
        from mcir.data.push import push as upload

        url = upload(output, push, options.split)
        print(f"{url}: in a config, source: {{format: hub, repo: {push}, split: {options.split}}}")


@app.command()
def inspect(
    source: Annotated[
        Path, typer.Argument(help="Folder of Parquet shards or tars, of clean images, or of a dataset (--layout).")
    ],
    layout: Layout = None,
    degraded: Degraded = None,
    pattern: Pattern = "{key}",
    clean_pattern: CleanPattern = "{key}",
    split: Split = None,
    scale: Scale = 1,
    column: Further = None,
    columns: Annotated[
        str | None, typer.Option(help="What Parquet columns are called, such as '{clean: hr, degraded: lr}'.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Where to save a contact sheet (PNG).")] = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Count, measure and decode every image; print what is wrong. Exit code 1 where anything is."""
    from mcir.data.files import files_at
    from mcir.data.inspect import contact_sheet, inspect_packed, inspect_pairs, inspect_units
    from mcir.data.sources import TarSource
    from mcir.evaluation.report import png, require_writable, write_whole

    if sheet:
        require_writable(sheet)
    plain = layout is None and degraded is None and not column
    packed, tars = (plain and bool(files_at(str(source), suffix)) for suffix in (".parquet", ".tar"))
    if split and layout is None:
        raise UserError("--split goes with a --layout, which knows where its parts are")
    if (packed or tars) and scale > 1:
        raise UserError(f"--scale goes with folders: the shards of {source} say themselves what scale their pairs have")
    if (packed or tars) and (pattern, clean_pattern) != ("{key}", "{key}"):
        raise UserError(f"--pattern goes with folders: the shards of {source} name their samples themselves")
    if columns and not packed:
        raise UserError(f"--columns goes with Parquet files, and {source} holds none")
    faults: list[Fault] = []
    if packed:
        report = inspect_packed(source, _columns(columns))
    elif tars:
        report = inspect_units(TarSource(format="tars", path=str(source)).open())
    else:
        pairs = _pairs(source, layout, degraded, split, scale, (pattern, clean_pattern), column, faults)
        report = inspect_pairs(pairs, faults)
    report.print()
    if sheet and report.examples:
        write_whole(sheet, png(contact_sheet(report.examples)))
    raise typer.Exit(1 if report.faults else 0)


def _degradation(text: str | None) -> Any:
    from mcir.data.chain import AnyDegradation

    return None if text is None else _parsed(AnyDegradation, text, "--degradation")


def _columns(text: str | None) -> Any:
    from mcir.data.parquet import Columns

    return Columns() if text is None else _parsed(Columns, text, "--columns")


def _parsed(kind: Any, text: str, option: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    from mcir.section import parse_yaml

    try:
        return TypeAdapter(kind).validate_python(parse_yaml(text, option))
    except ValidationError as error:
        faults = "; ".join(": ".join([*map(str, f["loc"]), f["msg"]]) for f in error.errors())
        raise UserError(f"{option} {text}: {faults}") from None


def _pairs(
    source: Path,
    layout: str | None,
    degraded: Path | None,
    split: str | None,
    scale: int,
    patterns: tuple[str, str],
    column: list[str] | None,
    faults: "list[Fault] | None" = None,
) -> "Pairs":
    from mcir.data.layouts import find_pairs
    from mcir.data.pairs import pair_folders, with_columns

    further = dict(_further(text) for text in column or [])
    if len(further) < len(column or []):
        raise UserError("--column: a name is given twice")
    if layout is None and degraded is None and scale > 1:
        raise UserError("--scale goes with --degraded or a --layout: clean images alone have none")
    if layout is None:
        return with_columns(pair_folders(source, degraded, scale, *patterns, faults), further, faults)
    if patterns != ("{key}", "{key}"):
        raise UserError("--pattern goes with plain folders: a --layout knows how its pairs are named")
    if degraded is not None:
        raise UserError("--degraded goes with plain folders: a --layout knows where its degraded images are")
    return with_columns(find_pairs(layout, source, split, scale if scale > 1 else None, faults), further, faults)


def _further(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise UserError(f"--column {text}: write NAME=FOLDER, such as dcp=prepared/dcp")
    return name, Path(folder)
