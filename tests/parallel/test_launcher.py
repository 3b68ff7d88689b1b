"""What Accelerate was asked for, as it tells its processes, is what they do, or it is refused."""

import pytest

from mcir.errors import UserError
from mcir.parallel.accelerator import build_accelerator


def launched(monkeypatch, **variables):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_fsdp1_is_refused(monkeypatch):
    launched(monkeypatch, ACCELERATE_USE_FSDP="true", FSDP_VERSION="1")
    with pytest.raises(UserError, match="asks for FSDP1"):
        build_accelerator()


@pytest.mark.parametrize(
    ("variable", "value", "field"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compute.compile"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "compute.checkpoint_activations"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulate"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "optim.max_grad_norm"),
    ],
)
def test_what_is_the_run_s_to_say_is_refused(monkeypatch, variable, value, field):
    launched(monkeypatch, **{variable: value})
    with pytest.raises(UserError, match=f"which is the run's to say: set {field}"):
        build_accelerator()


def test_a_multi_cpu_file_that_starts_one_process_is_refused(monkeypatch):
    """accelerate 1.15, utils/launch.py, prepare_simple_launcher_cmd_env: an address to meet at, and nobody to meet."""
    launched(monkeypatch, ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_CPU="True", MASTER_ADDR="127.0.0.1")
    with pytest.raises(UserError, match=r"asks for several processes.*starts one"):
        build_accelerator()


def test_shards_that_the_processes_cannot_make_are_refused(monkeypatch):
    """Also of a range of nodes, where the number of replicas follows that of the processes."""
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}
    sizes |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    for nodes, world_size in (("1", "4"), ("1:2", "6")):
        launched(monkeypatch, CUDA_VISIBLE_DEVICES="-1", PET_NNODES=nodes, WORLD_SIZE=world_size, **sizes)
        with pytest.raises(UserError, match=f"2 replicas of 4 shards are 8 processes, and {world_size} were started"):
            build_accelerator(batch_size=int(world_size))
