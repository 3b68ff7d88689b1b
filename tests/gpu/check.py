"""What only a GPU can say, in eight minutes, the most important first: started by run.sh.

Each part is a process with a time limit of its own, and results are written after every part, so that whatever ends
this early loses only what was not run. Without a GPU the same parts run with small sizes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.benchmarks.report import NETWORKS, machine
from tests.gpu.markdown import CONTRASTS, report

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
IN_ALL_S = 480
PATIENCE = 10  # with a CPU, which may have other things to do
STRATEGIES = ("single", "ddp", "fsdp2", "zero2", "zero3")
PRECISIONS = ("bf16", "fp32")
STEPS = 40 if ON_GPU else 4
ESSENTIALS = [  # what every other number rests on; -m gpu tests are skipped where there is none
    "tests/parallel",
    "tests/train/test_engine.py",
    "tests/train/test_graphs.py",
    "tests/objective/test_negatives.py",
    "tests/train/test_ema.py",
]
QUICKSTART = ["configs/quickstart.yaml", "validation=null", "data.num_workers=0", f"steps={STEPS}"]
QUICKSTART += [f"checkpoint.every={STEPS // 2}", f"tracking.log_every={STEPS // 2}"]
if not ON_GPU:
    QUICKSTART += ["batch_size=2", "data.crop_size=32", "arch.num_features=8", "arch.num_blocks=1"]
RECORDED = ["compute.precision=bf16", "compute.compile=true", "compute.cuda_graphs=true"]
SETTINGS = {  # of a step of each network, the most telling first
    "bf16, compiled, CUDA graphs": RECORDED,
    "bf16": ["compute.precision=bf16"],
    "bf16, compiled, CUDA graphs, one negative an image": [*RECORDED, "objective.contrast.negatives_per_image=one"],
    "bf16, CUDA graphs": ["compute.precision=bf16", "compute.cuda_graphs=true"],
    "bf16, cudnn.benchmark": ["compute.precision=bf16", "compute.cudnn_benchmark=true"],
    "tf32": ["compute.precision=tf32"],
    "fp32": ["compute.precision=fp32"],
}
if not ON_GPU:
    SETTINGS = {"bf16": SETTINGS["bf16"], "fp32": SETTINGS["fp32"]}


@dataclass
class Part:
    """One part: `work(seconds left)` gives what was found, or raises."""

    name: str
    limit_s: float
    work: Callable[[float], dict[str, Any]]
    seconds: float = 0.0
    fault: str | None = None
    found: dict[str, Any] = field(default_factory=dict)


def parts(folder: Path) -> Iterator[Part]:
    yield Part("environment", 30, environment)
    yield Part("tests", 150, essentials)
    yield Part("launches", 150, partial(launches, folder))
    for setting in SETTINGS:
        for network in NETWORKS if ON_GPU or setting == "bf16" else ["EDSR-light x4"]:
            yield Part(f"{network}, {setting}", 120, partial(bench, network, setting))
    yield Part(CONTRASTS, 90, contrasts)


def command(arguments: list[str], limit_s: float, **environment: str) -> str:
    """Standard output of a Python process; an error with its last lines where it fails or takes too long."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | environment
    pipe, whole = subprocess.PIPE, [sys.executable, "-m", *arguments]
    with subprocess.Popen(
        whole, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=env, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            # a launcher ends its workers
            for number, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=patience_s)
                    break
            raise RuntimeError(f"no end in {limit_s:.0f} s: {' '.join(arguments)}") from None
    if process.returncode:
        last = "\n".join((out + err).strip().splitlines()[-40:])  # a launcher's own come last
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(arguments)}\n{last}")
    return out


def environment(limit_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": machine(), "gpu": None}
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gib"] = properties.total_memory / 2**30
        found["capability"] = list(torch.cuda.get_device_capability())
        found["cudnn"] = torch.backends.cudnn.version()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return found | {"commit": commit.stdout.strip() or None}


def essentials(limit_s: float) -> dict[str, Any]:
    markers = "gpu or (not slow and not cluster)" if ON_GPU else "not slow and not cluster and not gpu"
    chosen = ESSENTIALS if ON_GPU else ESSENTIALS[-1:]
    shown = command(["pytest", "-q", "-m", markers, "-p", "no:cacheprovider", *chosen], limit_s)
    return {"result": shown.strip().splitlines()[-1]}


def launches(folder: Path, limit_s: float) -> dict[str, Any]:
    """Each launch file with one process (rehearsed on the CPU: with two), in each precision: trained, resumed,
    compared."""
    end = time.monotonic() + limit_s
    cases = [(strategy, precision) for precision in PRECISIONS for strategy in STRATEGIES]
    if not ON_GPU:
        cases = [("single", "bf16"), ("fsdp2", "fp32")]
    with ThreadPoolExecutor(len(cases) if ON_GPU else 1) as pool:
        ended = list(pool.map(lambda case: _outcome(lambda: launch(*case, folder, end)), cases))
    found = {f"{strategy}, {precision}": result for (strategy, precision), result in zip(cases, ended, strict=True)}
    failed = [name for name, result in found.items() if "fault" in result]
    if failed:
        raise PartlyFailed(f"{len(failed)} of {len(found)} launches failed: {'; '.join(failed)}", found)
    return found


class PartlyFailed(RuntimeError):
    """What was found in spite of the failure comes second."""


def launch(strategy: str, precision: str, folder: Path, end: float) -> dict[str, Any]:
    start, name = time.monotonic(), f"{strategy}-{precision}"
    file = strategy if ON_GPU or strategy == "single" else f"{strategy}_cpu"
    launcher = ["accelerate.commands.launch", "--config_file", f"launch/accelerate/{file}.yaml"]
    launcher += ["--num_processes", "1" if ON_GPU or strategy == "single" else "2", "--main_process_port", "0"]
    launcher += ["--mixed_precision", "no" if precision == "fp32" else precision, "-m"]
    train = ["mcir", "train", *QUICKSTART, f"runs_dir={folder / 'runs'}", f"compute.precision={precision}"]
    command([*launcher, *train, f"name={name}"], end - time.monotonic())
    whole = folder / "runs" / name / "checkpoints"
    middle, last = (f"step-{step:08d}" for step in (STEPS // 2, STEPS))
    resume = ["--resume", str(whole / middle)]
    command([*launcher, *train, f"name={name}-resumed", *resume], end - time.monotonic())
    expected = load_file(whole / last / "model.safetensors")
    got = load_file(folder / "runs" / f"{name}-resumed" / "checkpoints" / last / "model.safetensors")
    difference = max(float((got[key] - value).abs().max()) for key, value in expected.items())
    if difference > (1e-3 if ON_GPU else 0.0):  # a GPU's convolutions add up in no fixed order
        raise RuntimeError(f"a resumed run differs by {difference:.2g}")
    return {"seconds": time.monotonic() - start, "resumed_differs_by": difference}


def _outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {error}"}


def bench(network: str, setting: str, limit_s: float) -> dict[str, Any]:
    """`mcir bench` over the photographs of the quick start."""
    arguments, gpu_batch, smaller, _ = NETWORKS[network]
    size = [f"batch_size={gpu_batch}"]
    times = ["--steps", "20", "--rounds", "5"]
    if not ON_GPU:
        size = [*smaller, "batch_size=1", "data.num_workers=0", *TINY[network]]
        times = ["--steps", "1", "--rounds", "1"]
    shown = command(
        ["mcir", "bench", *arguments, "tests/benchmarks/photographs.yaml", *size, *SETTINGS[setting], *times, "--json"],
        limit_s,
    )
    return json.loads(next(line for line in shown.splitlines() if line.startswith("{")))


def contrasts(limit_s: float) -> dict[str, Any]:
    """Each way gives the same gradient, or this fails; then they are timed in turns."""
    size = ["--batch", "16", "--rounds", "10"] if ON_GPU else ["--batch", "1", "--side", "12", "--rounds", "1"]
    shown = command(["tests.benchmarks.bench_contrast", *size, "--json"], limit_s)
    return json.loads(next(line for line in shown.splitlines() if line.startswith("{")))


TINY = {
    "EDSR-light x4": ["data.crop_size=64", "arch.num_blocks=2"],
    "SwinIR-light x4": ["data.crop_size=64", "arch.image_size=16", "arch.depths=[2]", "arch.num_heads=[6]"],
    "NAFNet-32": ["data.crop_size=64", "arch.width=8"],
}


def main(folder: Path) -> int:
    begun, done = time.monotonic(), list[Part]()
    in_all_s = IN_ALL_S if ON_GPU else PATIENCE * IN_ALL_S
    for part in parts(folder):
        start = time.monotonic()
        left, limit_s = in_all_s - (start - begun), part.limit_s if ON_GPU else PATIENCE * part.limit_s
        if left < 5:
            part.fault = "not run: the time was up"
        else:
            try:
                part.found = part.work(min(limit_s, left))
            except PartlyFailed as error:
                part.fault, part.found = error.args
            except Exception as error:
                part.fault = f"{type(error).__name__}: {error}"
        part.seconds = time.monotonic() - start
        print(f"{part.name}: {'passed' if part.fault is None else part.fault} ({part.seconds:.0f} s)", flush=True)
        done.append(part)
        results = [{key: value for key, value in asdict(p).items() if key != "work"} for p in done]
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "report.md").write_text(report(results))
    return int(any(part.fault for part in done))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
