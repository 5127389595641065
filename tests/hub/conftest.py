import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants

from tests.hub_server import running_hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub to which this process pushes."""
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # made when that was imported
        monkeypatch.setattr(
            transformers.utils.hub, "_hf_api", None
        )  # transformers keeps one with the address of its time
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the server is in this machine
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api, "is_xet_available", lambda: False, raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
