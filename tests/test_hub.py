"""The hub's part is played by its local cache, whose layout the real client reads offline."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from lightning_merge import MergedModel
from tests.networks import MLP
from tests.test_merged import merged

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalApi:
    """Takes an upload as the hub does, and keeps it where a client would have cached it."""

    cache = Path()
    refuse = False

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private, exist_ok):
        if self.refuse:
            raise HfHubHTTPError(
                "403 Forbidden", response=SimpleNamespace(headers={}, request=None)
            )
        assert exist_ok

    def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns):
        repo = self.cache / f"models--{repo_id.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        shutil.copytree(folder_path, repo / "snapshots" / COMMIT)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}")


@pytest.fixture
def api(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalApi, "cache", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", LocalApi)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return LocalApi


def test_a_pushed_model_comes_back_the_same(api):
    model = merged(MLP(), "net.9")
    address = model.push_to_hub("team/experts")
    assert address.startswith("https://huggingface.co/team/experts/commit/")
    loaded = MergedModel.from_hub("team/experts", cache_dir=api.cache, module=MLP())
    x, p = torch.randn(4, 6), {"a": 0.3, "b": 0.7}
    assert torch.equal(loaded.with_preference(p)(x, "b"), model.with_preference(p)(x, "b"))


def test_what_the_hub_refuses_is_said(api, monkeypatch):
    monkeypatch.setattr(LocalApi, "refuse", True)
    with pytest.raises(ValueError, match=r"does not take 'team/experts'.*403.*token"):
        merged(MLP(), "net.9").push_to_hub("team/experts")


def test_a_model_that_is_not_there_is_named(api):
    with pytest.raises(ValueError, match="cannot fetch 'team/none'"):
        MergedModel.from_hub("team/none", cache_dir=api.cache)
    with pytest.raises(ValueError, match="cannot fetch 'no/such/name'"):
        MergedModel.from_hub("no/such/name", cache_dir=api.cache)
