"""An export is pushed only where that is asked for and possible."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from dpo.outcomes import ENVIRONMENT, USER, Outcome, outcome_of
from dpo.training import hub


class FakeApi:
    """Records what it is asked."""

    calls: list[tuple] = []  # noqa: RUF012

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        self.calls.append(("upload", folder_path, repo_id, commit_message))
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    FakeApi.calls = []
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    return FakeApi


def test_a_directory_is_one_commit_of_a_private_repository(api: type[FakeApi], tmp_path: Path) -> None:
    address = hub.push_to_hub(tmp_path, "me/my-model", private=True, message="After 3 steps")
    assert address == "https://huggingface.co/me/my-model"
    assert api.calls == [
        ("create", "me/my-model", True, True),
        ("upload", tmp_path, "me/my-model", "After 3 steps"),
    ]


@pytest.mark.parametrize("name", ["my-model", "me/my model", "me/x/y", "https://huggingface.co/me/x"])
def test_an_id_is_owner_and_name(api: type[FakeApi], name: str) -> None:
    with pytest.raises(ValueError, match="allowed: OWNER/NAME"):
        hub.check_hub_id(name)


def test_without_a_token_nothing_is_tried(
    api: type[FakeApi], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="run `hf auth login`, or set HF_TOKEN"):
        hub.push_to_hub(tmp_path, "me/my-model", private=True, message="x")
    assert api.calls == []


def test_what_the_hub_refuses_is_said(api: type[FakeApi], monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def refuse(self, *args, **choices):
        request = httpx2.Request("POST", "https://huggingface.co/api/repos/create")
        raise HfHubHTTPError("403 Forbidden", response=httpx2.Response(403, request=request))

    monkeypatch.setattr(FakeApi, "create_repo", refuse)
    with pytest.raises(
        ValueError, match=r"is written, but could not be pushed to me/my-model: .*403 Forbidden"
    ):
        hub.push_to_hub(tmp_path, "me/my-model", private=True, message="x")


@pytest.mark.parametrize(
    ("error", "outcome", "said"),
    [
        (
            HfHubHTTPError(
                "403 Forbidden",
                response=httpx2.Response(403, request=httpx2.Request("POST", "https://huggingface.co/api")),
            ),
            USER,
            "nothing can be pushed there: 403 Forbidden",
        ),
        (
            HfHubHTTPError(
                "503 Unavailable",
                response=httpx2.Response(503, request=httpx2.Request("POST", "https://huggingface.co/api")),
            ),
            ENVIRONMENT,
            "the hub cannot be reached: 503",
        ),
        (ConnectionError("no route to host"), ENVIRONMENT, "the hub cannot be reached: no route to host"),
        (httpx2.ConnectError("refused"), ENVIRONMENT, "the hub cannot be reached: refused"),
    ],
)
def test_a_repository_that_cannot_be_written_is_found_before_the_export(
    api: type[FakeApi], monkeypatch: pytest.MonkeyPatch, error: Exception, outcome: Outcome, said: str
) -> None:
    hub.require_repository("me/my-model", private=True)
    assert api.calls == [("create", "me/my-model", True, True)]

    def refuse(self, *args, **choices):
        raise error

    monkeypatch.setattr(FakeApi, "create_repo", refuse)
    with pytest.raises(Exception, match=said) as refused:
        hub.require_repository("me/my-model", private=True)
    assert outcome_of(refused.value) is outcome
    with pytest.raises(Exception, match="could not be pushed to me/my-model: ") as refused:
        hub.push_to_hub("directory", "me/my-model", private=True, message="x")
    assert outcome_of(refused.value) is outcome
