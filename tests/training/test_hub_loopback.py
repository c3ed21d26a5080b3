"""Models of a hub, through the real client: the hub is on loopback (hub_server.py)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, point_to, running_hub
from huggingface_hub import constants
from tiny_model import write_tiny_model

from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.training.hub import push_to_hub

NAME = "someone/tiny"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A model directory."""
    directory = write_tiny_model(tmp_path_factory.mktemp("model"))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The hub, with the client pointed at it and an empty cache."""
    with running_hub() as hub:
        point_to(hub, tmp_path / "cache", monkeypatch)
        yield hub


def with_hidden_size(files: dict[str, bytes], size: int) -> dict[str, bytes]:
    config = json.loads(files["config.json"]) | {"hidden_size": size}
    changed = {name: content for name, content in files.items() if name != "SHA256SUMS"}
    return changed | {"config.json": json.dumps(config).encode()}


def test_a_model_is_read_at_the_revision_that_is_named(hub: Hub, files) -> None:
    older = hub.put(f"models/{NAME}", with_hidden_size(files, 16), tag="v1")
    newest = hub.put(f"models/{NAME}", files)
    found = open_checkpoint(NAME)
    assert (found.source, found.hub_id) == (f"{NAME}@{newest}", NAME)
    assert found.config == json.loads(files["config.json"])
    assert found.tokenizer()("a")["input_ids"] == open_checkpoint(NAME).tokenizer()("a")["input_ids"]
    for revision in ("v1", older):
        then = open_checkpoint(f"{NAME}@{revision}")
        assert then.source == f"{NAME}@{older}"
        assert then.config["hidden_size"] == 16


def test_a_tokenizer_is_fetched_without_weights(hub: Hub, files) -> None:
    hub.put(f"models/{NAME}", files, tag="v1")
    ids = load_tokenizer(f"{NAME}@v1")("abc")["input_ids"]
    asked = [path for _, path, _ in hub.asked]
    assert not any(path.endswith(".safetensors") for path in asked)
    assert any(path.endswith("tokenizer.json") for path in asked)
    assert ids == open_checkpoint(NAME).tokenizer()("abc")["input_ids"]
    assert any(path.endswith(".safetensors") for _, path, _ in hub.asked)


@pytest.mark.parametrize(
    ("refused", "source", "message"),
    [
        ("gated", NAME, "gated|restricted"),
        ("private", NAME, "401|Repository Not Found"),
        (None, "someone/missing", "401|Repository Not Found"),
        (None, f"{NAME}@v9", "Revision Not Found|Invalid rev id"),
    ],
)
def test_what_the_hub_refuses_is_said(
    hub: Hub, files, monkeypatch: pytest.MonkeyPatch, refused: str | None, source: str, message: str
) -> None:
    hub.put(f"models/{NAME}", files)
    if refused is not None:
        getattr(hub, refused).add(f"models/{NAME}")
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        ValueError, match=rf"could not be fetched from the Hugging Face hub: [\s\S]*({message})"
    ):
        open_checkpoint(source)


def test_a_private_model_is_read_with_the_token(hub: Hub, files) -> None:
    hub.put(f"models/{NAME}", files)
    hub.private.add(f"models/{NAME}")
    assert open_checkpoint(NAME).config["model_type"] == "llama"


def test_a_broken_transfer_goes_on_where_it_ended(hub: Hub, files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    commit = hub.put(f"models/{NAME}", files)
    half = len(files["model.safetensors"]) // 2
    hub.breaks = [half]
    assert open_checkpoint(NAME).source == f"{NAME}@{commit}"
    stored = Path(constants.HF_HUB_CACHE) / "models--someone--tiny" / "snapshots" / commit
    assert (stored / "model.safetensors").read_bytes() == files["model.safetensors"]
    (asked,) = [asked for _, path, asked in hub.asked if asked is not None and path.endswith(".safetensors")]
    begin = int(asked.removeprefix("bytes=").partition("-")[0])
    assert half - 4096 <= begin <= half


def test_a_busy_hub_is_said_and_can_be_asked_again(hub: Hub, files) -> None:
    hub.put(f"models/{NAME}", files)
    hub.busy = 1
    with pytest.raises(ValueError, match=r"could not be fetched from the Hugging Face hub: [\s\S]*429"):
        open_checkpoint(NAME)
    assert open_checkpoint(NAME).config["model_type"] == "llama"


def test_offline_a_warm_cache_is_enough(hub: Hub, files, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.put(f"models/{NAME}", files)
    open_checkpoint(NAME)
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(NAME).source == f"{NAME}@{commit}"
    with pytest.raises(ValueError, match="'someone/other' is no directory here and could not be fetched"):
        open_checkpoint("someone/other")
    assert len(hub.asked) == asked


def test_what_is_pushed_is_read_back_equal(
    hub: Hub, files, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    directory = tmp_path / "export"
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    address = push_to_hub(directory, "me/mine", private=True, message="After 3 steps")
    assert address == f"{hub.endpoint}/me/mine"
    assert "models/me/mine" in hub.private
    found = hub.find("models/me/mine", "main")
    assert found is not None
    assert {name: found[1].get(name) for name in files} == files
    assert open_checkpoint("me/mine").config == json.loads(files["config.json"])
    printed = capfd.readouterr()
    assert TOKEN not in caplog.text + printed.out + printed.err


def test_a_refused_push_names_no_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anotherToken")
    with pytest.raises(ValueError, match="is written, but could not be pushed to me/mine") as refused:
        push_to_hub(tmp_path, "me/mine", private=True, message="x")
    assert "hf_anotherToken" not in str(refused.value)
