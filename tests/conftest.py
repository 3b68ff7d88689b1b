"""What tests need of their surroundings: the shared data, a GPU, a process that computes in no precision yet."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.golden import SHARED


@pytest.fixture
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared/data beside this checkout (set MCIR_SHARED)")
    return SHARED / "data"


@pytest.fixture(autouse=True)
def _own_precision():
    """Accelerate keeps one precision a process: no test leaves its own to the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
