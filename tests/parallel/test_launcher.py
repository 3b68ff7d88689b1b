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


def test_a_multi_cpu_file_that_starts_one_process_is_refused(monkeypatch):
    """accelerate 1.15, utils/launch.py, prepare_simple_launcher_cmd_env: an address to meet at, and nobody to meet."""
    launched(monkeypatch, ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_CPU="True", MASTER_ADDR="127.0.0.1")
    with pytest.raises(UserError, match=r"asks for several processes.*starts one"):
        build_accelerator()
