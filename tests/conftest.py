"""Where the shared golden data lies, when it does."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("MCIR_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture
def golden() -> Path:
    if not (SHARED / "golden").is_dir():
        pytest.skip("no shared/golden beside this checkout (set MCIR_SHARED)")
    return SHARED / "golden"


@pytest.fixture
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared/data beside this checkout (set MCIR_SHARED)")
    return SHARED / "data"
