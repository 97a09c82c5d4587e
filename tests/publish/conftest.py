"""A user of the local Hub, and the model that they publish."""

import pytest
from huggingface_hub import HfApi

from hub_fixtures import MINE
from pipeline.publish import connection


@pytest.fixture
def api(hub_server, measured, monkeypatch) -> HfApi:
    """The client of a user whose working directory has an evaluated model, `models/tiny`."""
    monkeypatch.setenv("HF_TOKEN", MINE)
    monkeypatch.setattr(connection, "BACKOFF", (0.01, 0.01))
    return HfApi(hub_server.url, token=MINE)
