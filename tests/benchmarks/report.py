"""Writes BENCHMARKS.md: everything that is measured, on the machine at hand, each table by the command above it.

    python -m tests.benchmarks.report [SECTION...] > BENCHMARKS.md

takes about a quarter of an hour on two CPU cores, which should have nothing else to do."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mcir.bench.sweep import Trial
from mcir.config import load
from mcir.train.memory import plan, without_values

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
EDSR = "configs/sr/edsr_light_x4_div2k.yaml"
BICUBIC, BLUR = (f"data.train.0.degradation.{d}" for d in ("name=bicubic", "name=gaussian_blur"))
BICUBIC_X4 = [BICUBIC, "data.train.0.degradation.scale=4"]
NAFNET = ["configs/deblur/nafnet_w32_gopro.yaml", BLUR]
NETWORKS = {  # as a GPU trains them, and small enough for a CPU
    "EDSR-light x4": ([EDSR, *BICUBIC_X4, "data.crop_size=192"], 16, [], 2),
    "SwinIR-light x4": (
        ["configs/sr/swinir_light_x4_div2k.yaml", *BICUBIC_X4, "data.crop_size=192", "arch.image_size=48"],
        16,
        [],
        1,
    ),
    "NAFNet-32": (NAFNET, 8, ["data.crop_size=128"], 1),
}
SETTINGS = [
    ("fp32", []),
    ("bf16", ["compute.precision=bf16"]),
    ("bf16, one negative an image", ["compute.precision=bf16", "objective.contrast.negatives_per_image=one"]),
]
WIDTHS = (8, 16, 32, 64) if not ON_GPU else (8, 16, 32, 64, 128)


def mcir(*arguments: str, launch: str | None = None, env: dict[str, str] | None = None) -> dict[str, Any]:
    """The numbers of `mcir bench` over the photographs of the quick start."""
    files = [a for a in arguments if a.endswith(".yaml")]
    rest = [a for a in arguments if not a.endswith(".yaml")]
    launcher = ["accelerate.commands.launch", "--config_file", f"launch/accelerate/{launch}.yaml", "-m"]
    command = [sys.executable, "-m", *(launcher if launch else []), "mcir", "bench", *files]
    command += ["tests/benchmarks/photographs.yaml", *rest, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | (env or {}))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [" | ".join(header), "|".join(["---"] + ["--:"] * (len(header) - 1))]
    return "\n".join(f"| {line} |" for line in lines + [" | ".join(map(str, row)) for row in rows])


def steps() -> str:
    rows = []
    for (name, (arguments, gpu_batch, smaller, cpu_batch)), (label, setting) in product(NETWORKS.items(), SETTINGS):
        size = [f"batch_size={gpu_batch}"] if ON_GPU else [*smaller, f"batch_size={cpu_batch}", "--steps", "5"]
        r = mcir(*arguments, *size, *setting, *([] if ON_GPU else ["--rounds", "3"]))
        ms, flops, parts = r["compared_ms"], r["flops"], r["parts_ms"]
        whole = sum(parts.values())
        rows.append(
            [
                f"{name}, batch {r['batch_size']}, crop {r['crop_size']}, {label}",
                f"{ms['mcir']:.0f}",
                f"**{ms['mcir'] / ms['reference']:.2f}**",
                f"{ms['mcir'] / ms['plain']:.2f}",
                f"{flops['mcir'] / flops['reference']:.2f}",
                f"{flops['mcir'] / flops['plain']:.2f}",
                *(f"{parts[part] / whole:.0%}" for part in ("target", "negatives", "features", "optimizer")),
                f"{r['data_wait']:.1%}",
                f"{r['update_ms'] / 100 / ms['mcir']:.2%}",
                "" if r["mfu"] is None else f"{r['mfu']:.0%}",
            ]
        )
    header = "4 negatives,ms/step,time / reference,time / plain,FLOP / reference,FLOP / plain,target,negatives,"
    return table([*f"{header}features,optimizer".split(","), "data wait", "update, every 100", "MFU"], rows) + (
        "\n\nReference: the published pseudo-code, in the same run and in turns (restored features again for each "
        "negative, fp32, NCHW, default Adam, and the network as its authors published it). Plain: the same step "
        "without negatives. `mcir bench CONFIG` prints this."
    )


def negatives() -> str:
    rows, plain = [], 0.0
    for k in (0, 1, 2, 4, 8):
        schedules = json.dumps([{"update_every": 100}] * k)
        small = ["--steps", "3", "--rounds", "3", "--no-compare", f"batch_size={16 if ON_GPU else 2}"]
        r = mcir(EDSR, *BICUBIC_X4, "data.crop_size=192", f"objective.contrast.negatives={schedules}", *small)
        ms = r["compared_ms"]["mcir"]
        plain = plain or ms
        rows.append([k, f"{ms:.0f}", f"{ms / plain:.2f}", f"{(ms - plain) / k / plain:.2f}" if k else "", ""])
        rows[-1][-1] = f"{r['flops']['mcir'] / 1e9:.0f}"
    return table(["K", "ms/step", "/ K = 0", "a negative, in plain steps", "GFLOP"], rows)


def parameters() -> str:
    rows = []
    for width in WIDTHS:
        size = [
            f"arch.width={width}",
            "data.crop_size=64",
            "batch_size=1",
            'objective.contrast.negatives=[{"decay":0.1}]',
        ]
        r = mcir(*NAFNET, *size, "--steps", "2", "--rounds", "2", "--no-compare")
        rows.append([f"{r['parameters']:,}", f"{r['compared_ms']['mcir']:.0f}", f"{r['update_ms']:.1f}"])
        rows[-1] += [f"{r['update_ms'] / 100 / r['compared_ms']['mcir']:.2%}", *planned(size)]
    for width in (128, 256)[len(WIDTHS) - 4 :]:
        size = [
            f"arch.width={width}",
            "data.crop_size=64",
            "batch_size=1",
            'objective.contrast.negatives=[{"decay":0.1}]',
        ]
        config = config_of(*NAFNET, *size)
        num = sum(p.numel() for p in without_values(config).parameters())
        rows.append([f"{num:,}", "", "", "", *planned(size)])
    return table(
        ["NAFNet, K = 1", "ms/step", "update, ms", "at update_every 100", "plan, 1 process, GiB", "fsdp2 x 8, GiB"],
        rows,
    ) + (
        "\n\nBatch 1, crop 64: a very small step, so the worst case for the update. The plan is that of "
        "`mcir train --dry-run`; rows without times were planned only."
    )


def config_of(*arguments: str) -> Any:
    files = [a for a in arguments if a.endswith(".yaml")] + [ROOT / "tests/benchmarks/photographs.yaml"]
    return load([ROOT / file for file in files], [a for a in arguments if not a.endswith(".yaml")])


def planned(size: Sequence[str]) -> list[str]:
    config = config_of(*NAFNET, *size)
    sharded = config_of(*NAFNET, *size, "batch_size=8")
    return [
        f"{sum(plan(config, 'single', 1).values()) / 2**30:.1f}",
        f"{sum(plan(sharded, 'fsdp2', 8).values()) / 2**30:.1f}",
    ]


def processes() -> str:
    rows: list[list[str]] = []
    one = {"OMP_NUM_THREADS": "1"}
    small = ["configs/quickstart.yaml", BICUBIC, "data.train.0.degradation.scale=2", "--steps", "15", "--no-compare"]
    for workers in (0, 1, 2):
        r = mcir(*small, f"data.num_workers={workers}", "--rounds", "1", env=one)
        rows.append([f"1 process, {workers} workers", f"{r['images_per_s']:.1f}", f"{r['data_wait']:.1%}", ""])
    for strategy in ("ddp", "fsdp2", "zero2", "zero3"):
        r = mcir(*small, "data.num_workers=0", "--rounds", "1", launch=f"{strategy}_cpu", env=one)
        ratio = r["images_per_s"] / float(rows[0][1])
        rows.append([f"{strategy}, 2 processes", f"{r['images_per_s']:.1f}", f"{r['data_wait']:.1%}", f"{ratio:.2f}"])
    return table(["quick start, a thread a process", "images/s", "data wait", "/ 1 process, 0 workers"], rows)


def model() -> str:
    """No measurement: FLOP and bytes counted here, rates from data sheets."""
    rows = []
    peak, used, inside, between = 989e12, 0.3, 450e9, 50e9
    cases = {name: (arguments, batch) for name, (arguments, batch, _, _) in NETWORKS.items()}
    cases["NAFNet-256"] = ([*NAFNET, "arch.width=256"], 8)
    for name, (arguments, batch) in cases.items():
        config = config_of(*arguments, f"batch_size={batch}")
        num_bytes = 4 * sum(p.numel() for p in without_values(config).parameters())
        compute = flops(config) / (used * peak)
        for num in (8, 64, 512):
            rate = inside if num <= 8 else between
            once = num_bytes * (num - 1) / num / rate
            ddp, fsdp = compute + 2 * once, compute + 3 * once
            # weights gathered twice and gradients scattered inside a node; a shard's gradients reduced between nodes
            inner, nodes = num_bytes * 7 / 8 / inside, num // 8
            hsdp = compute + 3 * inner + 2 * num_bytes / 8 * (nodes - 1) / nodes / between
            efficiency = [f"{compute / (t + u / 100):.0%}" for t, u in ((ddp, 0), (fsdp, once), (hsdp, inner))]
            rows.append([f"{name}, {num} GPUs", f"{num_bytes / 4e6:.1f}", f"{1e3 * compute:.1f}"])
            rows[-1] += [f"{1e3 * 2 * once:.2f}", f"{1e3 * once:.2f}", *efficiency]
    header = (
        "a model,M parameters,compute ms,gradients ms (ddp),update ms,ddp efficiency,fsdp2 efficiency,hsdp efficiency"
    )
    return table(header.split(","), rows) + (
        "\n\nA model on paper, not a measurement: FLOP of a step with 4 negatives, counted, at 30 % of an H100's 989 "
        "TFLOP/s in bf16; fp32 gradients all-reduced (ddp) or weights gathered twice and gradients scattered "
        "(fsdp2) at 450 GB/s inside a node of 8 and 50 GB/s between nodes; hsdp does the latter inside each node and "
        "all-reduces a shard's gradients between nodes. Nothing overlapped, negatives updated every 100 steps. It says "
        "where communication starts to matter, and that the update is never where: hsdp is worth its launch file as "
        "soon as there are two nodes, and has fsdp2's memory of one node."
    )


def flops(config: Any) -> int:
    """FLOP of a step, counted without computing: tensors of the meta device have shapes only."""
    from mcir.bench.counts import count_flops
    from mcir.objective.objective import Objective

    scale, crop = config.arch.descriptor.scale, config.data.crop_size
    net = without_values(config)
    with torch.device("meta"):
        objective = Objective(config.objective)
        degraded = torch.rand(config.batch_size, 3, crop // scale, crop // scale)
        clean = torch.rand(config.batch_size, 3, crop, crop)

    def step(_: Any) -> None:
        with torch.no_grad():
            past = [net(degraded) for _ in range(config.objective.num_negatives)]
        objective(net(degraded), clean, degraded, past)["total"].backward()

    return count_flops(step, [])


def updates() -> str:
    """Measured on two CPU processes where it fits, and what one process receives for networks of any size."""
    rows: dict[str, list[str]] = {}
    in_forward = ""
    for strategy in ("ddp", "fsdp2", "zero2", "zero3"):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [f"launch/accelerate/{strategy}_cpu.yaml", "tests/benchmarks/bench_negatives.py", "--json"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=env)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                r = json.loads(line)
                shown = f"{r['update_ms']:.0f} ms, {r['update_ms'] / r['step_ms']:.0%}, {r['received_mib']:.1f} MiB"
                rows.setdefault(f"{r['parameters']:,}", []).append(shown)
                if strategy == "fsdp2":
                    saved = (r["update_ms"] - r["in_forward_ms"]) / r["step_ms"] / 100
                    in_forward = f"{r['in_forward_ms']:.0f} ms for {r['update_ms']:.0f} ms: {saved:.2%} of the time"
    for num in (17_111_907, 67_888_835, 270_437_763, 1_079_515_907):
        mib = num * 4 / 2**20
        rows[f"{num:,}"] = ["0.0 MiB", *(f"{share * mib / 2:.1f} MiB" for share in (1, 2, 1))]
    header = ["parameters", "ddp x 2", "fsdp2 x 2", "zero2 x 2", "zero3 x 2"]
    return table(header, [[name, *cells] for name, cells in rows.items()]) + (
        "\n\nOne update of two negatives that are due together: time, share of a training step, bytes that a process "
        "receives; larger networks are counted only. It happens every `update_every` steps (100 to 1000 as published). "
        "Tried and not kept: copying under fsdp2 in the next forward, which has each block whole anyway, takes, at the "
        f"largest size measured, {in_forward} at `update_every: 100`, and needs a hook on every module."
    )


def settings() -> str:
    """Each on top of those that paid before it."""
    command = [sys.executable, "-m", "mcir", "bench", EDSR, "tests/benchmarks/photographs.yaml", *BICUBIC_X4]
    command += ["data.crop_size=192", f"batch_size={16 if ON_GPU else 2}", "--sweep", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    trials = [Trial(**values) for values in json.loads(done.stdout)]
    return "\n".join(f"- {trial}" for trial in trials) + "\n\nBy `mcir bench CONFIG --sweep`."


def contrast() -> str:
    return printed("tests.benchmarks.bench_contrast")


def networks() -> str:
    why = "One thread, processor time, in turns; forward and backward, and forward alone as a negative goes."
    return printed("tests.benchmarks.bench_networks") + f"\n\n{why} Published: spandrel's module, the same weights."


def before() -> str:
    where = (
        "EDSR-light x4, batch 2, crop 192, 4 negatives, one thread, in turns; on a busy machine processor time tells."
    )
    return printed("tests.benchmarks.bench_before", "da19e0f") + f"\n\n{where}"


def saving() -> str:
    return printed("tests.benchmarks.bench_saving")


def data() -> str:
    shown = printed("tests.benchmarks.bench_data", "--seconds", "3")
    why = "mcir decodes no row below the crop, and so passes the decoder; WebP without loss has to be decoded whole."
    loader = printed("tests.benchmarks.bench_loader", "da19e0f")
    small = "Photographs of the quick start, crop 192, bicubic x4 on the fly, in turns; processor time tells."
    return f"```\n{shown}\n```\n\n{why}\n\n{loader}\n\n{small}"


def printed(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip("\n")


def gpu() -> str:
    """What tests/gpu/run.sh finds; on a machine without a GPU what it found on the last one."""
    if not ON_GPU:
        return (
            "`bash tests/gpu/run.sh FOLDER` checks and times a checkout on a GPU in at most eight minutes: the suite's "
            "essentials, every launch file, the three networks of the first table. This machine has none.\n\n"
        ) + (ROOT / "tests/gpu/h200.md").read_text().strip()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["bash", "tests/gpu/run.sh", folder], cwd=ROOT, check=False, stdout=sys.stderr)
        return Path(folder, "report.md").read_text().partition("\n")[2].strip()


def machine() -> str:
    names = [f"{name} {version(name)}" for name in ("torch", "accelerate", "deepspeed", "datasets")]
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    hardware = f"{[*cpu, platform.machine()][0]}, {os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if ON_GPU else "no GPU"
    return f"{hardware}, {device}; Python {platform.python_version()}, {', '.join(names)}"


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "steps": ("A contrastive step", steps),
    "networks": ("The networks, and as they were published", networks),
    "before": ("A contrastive step before there were other contrasts, and now", before),
    "negatives": ("Number of negatives (EDSR-light x4)", negatives),
    "contrast": ("Ways to compute the contrast", contrast),
    "settings": ("Settings tried (EDSR-light x4)", settings),
    "parameters": ("Number of parameters", parameters),
    "updates": ("An update of the negatives, by strategy", updates),
    "saving": ("A save beside the training", saving),
    "processes": ("Workers and processes", processes),
    "model": ("8 to 512 GPUs", model),
    "data": ("Training data", data),
    "gpu": ("On a GPU", gpu),
}


def main() -> None:
    chosen = sys.argv[1:] or list(SECTIONS)
    print(
        f"# Benchmarks\n\nMade by `python -m tests.benchmarks.report`. Ratios are of one run.\n\n{machine()}.",
        flush=True,
    )
    for name in chosen:
        title, section = SECTIONS[name]
        print(f"\n## {title}\n\n{section()}", flush=True)


if __name__ == "__main__":
    main()
