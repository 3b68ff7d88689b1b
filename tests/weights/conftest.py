"""A Hub on this machine, and an empty cache."""

from pathlib import Path

import pytest

from mcir.data import storage
from tests import hub


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub's; and what fails is not tried again for seconds."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.01))
    return tmp_path / "home"


@pytest.fixture
def the_hub(tmp_path, monkeypatch, cache):
    from huggingface_hub import constants

    with hub.serve(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
