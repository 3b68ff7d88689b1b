"""Every launch file is what Accelerate accepts, and says what its name says."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

FILES = sorted((Path(__file__).parents[1] / "launch" / "accelerate").glob("*.yaml"))
TYPES = {
    "single": "NO",
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "hsdp": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
}


def test_all_are_there():
    rehearsals = {f"{name}_cpu" for name in TYPES if name != "single"}
    assert {file.stem for file in FILES} == TYPES.keys() | rehearsals


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_accelerate_accepts_it(file):
    name, _, cpu = file.stem.partition("_")
    loaded = load_config_from_file(str(file))
    assert loaded.distributed_type == TYPES[name]
    assert loaded.mixed_precision == ("no" if cpu else "bf16")
    assert (loaded.gpu_ids == "-1,-1") == bool(cpu)
    args = launch_command_parser().parse_args(["--config_file", str(file), "-m", "mcir", "train", "x.yaml"])
    args, _, _ = _validate_launch_command(args)
    assert args.use_fsdp == (name in ("fsdp2", "hsdp"))
    assert args.use_deepspeed == name.startswith("zero")
    assert args.multi_gpu == (name == "ddp")
    if args.use_fsdp:
        assert args.fsdp_version == 2
    assert args.use_parallelism_config == (name == "hsdp")
    if name == "hsdp":
        sizes = args.parallelism_config_dp_replicate_size, args.parallelism_config_dp_shard_size
        assert sizes[0] * sizes[1] == args.num_processes
    if name.startswith("zero"):
        assert args.zero_stage == int(name[-1])
