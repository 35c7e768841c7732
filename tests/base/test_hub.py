"""A base that is no folder: the hub is asked once, and its answer decides."""

import types

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from lorica.base import hub
from lorica.errors import BaseModelError

RESPONSE = types.SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Sets what the hub answers; the list of what was asked."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub._asked.cache_clear()

    def answer(error: BaseException | None, *, cached: bool = False) -> list:
        def call(url, *, timeout):
            calls.append((url, timeout))
            if error is not None:
                raise error

        monkeypatch.setattr(hub, "get_hf_file_metadata", call)
        found = str(tmp_path / "config.json") if cached else None
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: found)
        return calls

    return answer


def test_one_that_is_there_is_asked_for_once(asked):
    calls = asked(None)
    assert hub.hub_options("org/name") == hub.hub_options("org/name") == {}
    [(url, seconds)] = calls
    assert url.endswith("/org/name/resolve/main/config.json") and seconds <= 10


@pytest.mark.parametrize("kind", [GatedRepoError, RemoteEntryNotFoundError, HfHubHTTPError])
def test_what_the_hub_says_is_left_to_its_library(asked, kind):
    asked(kind("told", response=RESPONSE))
    assert hub.hub_options("org/name") == {}


def test_one_that_is_not_there(asked, tmp_path):
    asked(RepositoryNotFoundError("told", response=RESPONSE), cached=True)
    (tmp_path / "cache" / "models--org--small-llama").mkdir(parents=True)
    with pytest.raises(BaseModelError, match="has none of that name") as caught:
        hub.hub_options("org/smal-llama")
    assert caught.value.mend == "did you mean org/small-llama?"


def test_without_a_network_the_cache_is_used_without_asking_again(asked):
    asked(ConnectionError("no route"), cached=True)
    assert hub.hub_options("org/name") == {"local_files_only": True}


def test_without_a_network_and_not_in_the_cache(asked):
    asked(ConnectionError("no route"))
    with pytest.raises(BaseModelError, match="did not answer: no route"):
        hub.hub_options("org/name")


def test_offline_nothing_is_asked(asked, monkeypatch):
    calls = asked(None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE forbids"):
        hub.hub_options("org/name")
    asked(None, cached=True)
    assert hub.hub_options("org/name") == {} and not calls


def test_folders_here_are_suggested(asked, tmp_path):
    asked(ConnectionError("no route"))
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2/config.json").write_text("{}")
    with pytest.raises(BaseModelError) as caught:
        hub.hub_options("smollm")
    assert caught.value.mend == "did you mean smollm2?"
    assert hub.hub_options("smollm2") == {}
