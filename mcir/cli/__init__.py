"""The command line: parsing only. Heavy imports are inside the commands, so that --help answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mcir.cli.arguments import Configs, ManyValues, MaxPixels, kind_of, split, tile_of
from mcir.cli.config import app as config_app
from mcir.cli.data import app as data_app
from mcir.cli.init import init
from mcir.cli.study import study
from mcir.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.command(cls=ManyValues)(study)
app.command()(init)

WeightsKind = Annotated[
    str | None,
    typer.Option(metavar="ema|target", help="Averaged or raw weights of a run; by default what the run validates."),
]
Archs = Annotated[
    list[str],
    typer.Option(
        metavar="YAML|CONFIG",
        help="The network of weights that mcir did not write: '{name: edsr, scale: 4}' or a config file.",
    ),
]
AllowImport = Annotated[bool, typer.Option("--allow-import", help="Let the weights name code of yours to import.")]
Overlap = Annotated[int | None, typer.Option(help="Overlap of neighbouring tiles, in input pixels.")]
Ensemble = Annotated[bool, typer.Option("--ensemble", help="Mean over the 8 turns and mirrorings; 8 times as long.")]


def _version(asked: bool) -> None:
    if asked:
        from mcir import __version__

        print(f"mcir {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train image-restoration networks against their own history."""


@app.command()
def train(
    configs: Configs,
    resume: Annotated[
        str,
        typer.Option(
            help="never: a new run directory. auto: go on with the newest checkpoint, or begin. PATH: that run, or "
            "a new one from that checkpoint."
        ),
    ] = "never",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved config and what each process would hold; start nothing."),
    ] = False,
    processes: Annotated[
        list[int],
        typer.Option(
            min=1,
            help="With --dry-run: the number of processes to plan for; by default the launcher's, or 2. Again for each "
            "further one that there may be: all must be able to share the batches, and the plan is for the fewest.",
        ),
    ] = [],  # noqa: B006
    max_pixels: MaxPixels = None,
) -> None:
    """Train a network. Use `accelerate launch --config_file launch/accelerate/NAME.yaml -m mcir train …` for
    several processes."""
    from mcir.config import dump, load, require_shared

    files, overrides = split(configs)
    config = load(files, overrides)
    if processes and not dry_run:
        raise UserError("--processes is of --dry-run: `accelerate launch --num_processes` starts several")
    if dry_run:
        from rich.console import Console

        from mcir.train.memory import table

        sizes = processes or [int(size) for size in os.environ.get("WORLD_SIZE", "").split()]
        require_shared(config, sizes)
        if int(os.environ.get("RANK", "0")) == 0:
            print(dump(config), end="")
            Console(markup=False).print(table(config, min(sizes or [2])))
        return
    import torch

    from mcir.parallel.launch import unused_devices
    from mcir.recipes.shipped import changes
    from mcir.train.engine import build_engine

    changed = changes(config, files)
    if int(os.environ.get("RANK", "0")) == 0:
        said = unused_devices(torch.accelerator.device_count(), sys.argv, os.environ)
        for line in [*changed, *([said] if said else [])]:
            print(line, flush=True)
    engine = build_engine(config, resume)
    engine.record.update(changed=changed[1:])
    exit_code = engine.fit()
    engine.accelerator.end_training()
    raise typer.Exit(exit_code)


@app.command(cls=ManyValues)
def evaluate(
    weights: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH...",
            help="Weights files, checkpoints or runs (their best checkpoint), hf://owner/repo, "
            "https://…#sha256=…, s3://…; several compare.",
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PLACE...",
            help="Parquet files, an image folder, a config (its validation sets), NAME=CLEAN,DEGRADED folders or "
            "NAME={source: ..., degradation: ..., protocol: ...}.",
        ),
    ],
    protocol: Annotated[
        str | None,
        typer.Option(help="sr, rgb, ffanet, dehazeformer, derain or nafnet; by default the set's, or sr."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="bicubic|degraded", help="One more row: without a network.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Beside it what others measured, as a recipe given as --data says.")
    ] = False,
    metrics: Annotated[
        list[str],
        typer.Option(
            metavar="NAME|YAML...",
            help="Beside PSNR and SSIM: ms_ssim, lpips, dists, niqe, '{name: import, …}'; by default those of a config "
            "given as --data, or none.",
        ),
    ] = [],  # noqa: B006
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Results, checksums, configs, versions.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="A line for each image.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="PNG of the differences and intervals.")] = None,
    save_images: Annotated[Path | None, typer.Option(metavar="DIR", help="Restored images, and side by side.")] = None,
    divergence: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Maps of where two weights differ, beside the degradation.")
    ] = None,
    weights_kind: WeightsKind = None,
    arch: Archs = [],  # noqa: B006
    tile: Annotated[str | None, typer.Option(metavar="N|auto", help="Side of tiles; by default whole images.")] = None,
    overlap: Overlap = None,
    ensemble: Ensemble = False,
    max_pixels: MaxPixels = None,
    allow_import: AllowImport = False,
) -> None:
    """Measure PSNR and SSIM as the papers do, and further metrics. Under `accelerate launch` processes share
    the images."""
    from mcir.evaluation.measure import Options, Outputs, measure
    from mcir.evaluation.perceptual import parse
    from mcir.parallel.accelerator import build_accelerator
    from mcir.weights.trained import open_trained

    accelerator = build_accelerator(batch_size=int(os.environ.get("WORLD_SIZE", "1")))
    networks = open_trained(weights, kind_of(weights_kind), arch, allow_import, accelerator)
    options = Options(tile_of(tile), overlap, ensemble)
    outputs = Outputs(json, csv, plot, save_images, divergence)
    report = measure(
        networks,
        data,
        accelerator,
        protocol=protocol,
        baseline_name=baseline,
        published=published,
        metrics=parse(metrics),
        options=options,
        outputs=outputs,
    )
    accelerator.end_training()
    if (failures := report.failures) and accelerator.is_main_process:
        raise UserError("\n".join([f"{len(failures)} could not be measured and are left out:", *failures]))


@app.command()
def restore(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders and patterns.")],
    weights: Annotated[
        str, typer.Option(metavar="PATH", help="Weights file, checkpoint, run, hf://owner/repo or another URL.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the restored pictures go, by the same names.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Redo what exists.")] = False,
    weights_kind: WeightsKind = None,
    arch: Archs = [],  # noqa: B006
    tile: Annotated[str, typer.Option(metavar="N|auto", help="Side of tiles; auto: only where it must be.")] = "auto",
    overlap: Overlap = None,
    ensemble: Ensemble = False,
    max_pixels: MaxPixels = None,
    allow_import: AllowImport = False,
) -> None:
    """Restore pictures; formats, bit depth, alpha, profile and orientation are kept. Exit code 1 if any failed."""
    import torch

    from mcir.restoration.restore import restore as restore_pictures
    from mcir.weights.trained import open_trained

    network = open_trained([weights], kind_of(weights_kind), arch, allow_import)[0]
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    failures = restore_pictures(
        inputs,
        network.net_on(device),
        network.arch.descriptor,
        output,
        device=device,
        overwrite=overwrite,
        tile=tile_of(tile),
        overlap=overlap,
        ensemble=ensemble,
    )
    if failures:
        raise UserError("\n".join([f"{len(failures)} could not be restored:", *failures]))


@app.command()
def bench(
    configs: Configs,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps timed with the loader: 20; of --sweep 4.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of mcir, plain and reference in turns.")] = 5,
    compare: Annotated[bool, typer.Option(help="Whether plain and reference are timed too.")] = True,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Try bf16, channels_last, CUDA graphs, compile, batch sizes; print the best as YAML to train with.",
        ),
    ] = False,
) -> None:
    """Time training steps on this machine: their parts, and against a plain and a straightforward step."""
    from json import dumps

    from rich.console import Console

    from mcir.config import load

    config = load(*split(configs))
    if sweep:
        from mcir.bench import sweep as settings

        if "WORLD_SIZE" in os.environ:
            raise UserError("--sweep measures one process: run it without a launcher")
        trials = []
        for trial in settings.sweep(config, configs, steps or 4, rounds):
            trials.append(trial)
            print(trial, file=sys.stderr, flush=True)
        if trials[0].fault:
            raise UserError(f"the config as it is cannot be timed: {trials[0].fault}")
        print(dumps([vars(trial) for trial in trials]) if json else settings.dump(trials).rstrip())
        return
    from mcir.bench.bench import bench as measure
    from mcir.bench.bench import report

    result = measure(config, steps or 20, rounds, compare)
    if int(os.environ.get("RANK", "0")):
        return
    if json:
        print(dumps(result))
    else:
        for shown in report(result):
            Console(markup=False).print(shown, highlight=False)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of runs, or one run.")],
    json: Annotated[bool, typer.Option("--json", help="Print the records (run.json) as a JSON list.")] = False,
) -> None:
    """List runs with state, step, best metric and speed."""
    from json import dumps

    from rich.console import Console

    from mcir.train.record import read, table

    records = read(folder)
    if json:
        print(dumps(records, indent=1))
    else:
        Console(markup=False).print(table(records))


@app.command()
def export(
    weights: Annotated[
        str, typer.Argument(metavar="[NAME=]PATH", help="Weights file, checkpoint or run (its best checkpoint).")
    ],
    to: Annotated[str, typer.Option(help="basicsr, official, onnx, hub-folder, or hub, which uploads that folder.")],
    output: Annotated[
        Path | None, typer.Option(help="File or folder to write; by default the weights' name, here.")
    ] = None,
    size: Annotated[tuple[int, int] | None, typer.Option(help="Height and width of an ONNX graph of one size.")] = None,
    repo: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="With --to hub: the model repository.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Where --to hub makes the repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="With --to hub: a branch; by default main.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Of the weights, for the card, such as apache-2.0.")
    ] = None,
    weights_kind: WeightsKind = None,
    arch: Archs = [],  # noqa: B006
    allow_import: AllowImport = False,
) -> None:
    """Write trained weights as another program reads them."""
    import torch

    from mcir.evaluation.samples import samples
    from mcir.weights.export import export as write
    from mcir.weights.publish import publish
    from mcir.weights.trained import open_trained

    if (to == "hub") != bool(repo) or (to != "hub" and (private or revision)):
        raise UserError("--repo owner/name goes with --to hub, and so do --private and --revision")
    if licence and to not in ("hub", "hub-folder"):
        raise UserError("--license goes with --to hub and hub-folder, which write a card")
    trained = open_trained([weights], kind_of(weights_kind), arch, allow_import)[0]
    pictures = samples(trained, torch.device("cpu")) if to in ("hub", "hub-folder") else None
    if repo:
        print(publish(trained, repo, private, revision, output, pictures, licence))
    else:
        print(write(trained, to, output, size, pictures, licence))  # type: ignore[arg-type]


def main() -> None:
    """Run the command line; a mistake of the user's ends with one sentence and exit code 1."""
    try:
        app()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        print(f"mcir: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        sys.exit(1)
