"""What tests need of their surroundings: the shared data, a GPU, a process that computes in no precision yet, and a
checkout in which they leave nothing behind."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two files at a time would share the cores twice over
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `deterministic` needs it from the start

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.golden import SHARED

CHECKOUT = Path(__file__).parents[1]
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "mcir-hypothesis"))


@pytest.fixture
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared/data beside this checkout (set MCIR_SHARED)")
    return SHARED / "data"


@pytest.fixture
def set5(shared_data: Path) -> Path:
    if not (shared_data / "Set5/HR").is_dir():
        pytest.skip(f"no Set5 in {shared_data}")
    return shared_data / "Set5"


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is equal to the bit on a CPU is so on a GPU, which else adds up in no fixed order."""
    if not torch.cuda.is_available():
        yield
        return
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_in_the_checkout():
    """The caches of pytest and of the tools apart."""
    before = set(os.listdir(CHECKOUT))
    yield
    left = {name for name in set(os.listdir(CHECKOUT)) - before if "cache" not in name}
    assert not left, f"the tests left {', '.join(sorted(left))} in {CHECKOUT}"


@pytest.fixture(autouse=True)
def _own_precision():
    """Accelerate keeps one precision a process: no test leaves its own to the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
