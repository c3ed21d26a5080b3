"""Secrets of the environment are cut out of what is said; a proxy that no request could go by is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpo.cli import main
from dpo.config import EndpointConfig
from dpo.hidden import PROXIES, TOKENS, cut_secrets
from dpo.judging.endpoint import EndpointJudge
from dpo.judging.journal import Journal
from dpo.judging.judges import Template, default_template
from dpo.judging.keys import Key
from dpo.judging.samples import model_identity
from dpo.outcomes import EnvironmentFailure, describe
from dpo.proxies import check_proxies
from dpo.terminal import show_controls

PASSWORD = "hunter2/Qz@77"
IN_A_URL = "hunter2%2FQz%4077"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies and no tokens of whoever runs the tests."""
    for name in (*PROXIES, *TOKENS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("spelled", [PASSWORD, IN_A_URL, f"bob:{PASSWORD}", f"bob:{IN_A_URL}"])
@pytest.mark.parametrize("variable", ["https_proxy", "ALL_PROXY", "PIP_INDEX_URL"])
def test_a_proxys_password_is_said_nowhere(
    spelled: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of it a library quotes, on the terminal, in an error, beside an endpoint's verdict."""
    monkeypatch.setenv(variable, f"http://bob:{IN_A_URL}@proxy:3128")
    said = f"cannot connect to http://{spelled}@proxy:3128"
    for shown in (
        show_controls(said),
        describe("dpo train", EnvironmentFailure(said)),
        Key(None, "MY_KEY").cut_from(said),
    ):
        assert "hunter2" not in shown
        assert "[key]" in shown
        assert "proxy:3128" in shown


def test_a_password_with_an_at_sign_is_cut_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"bob:{PASSWORD}@proxy")
    assert cut_secrets(f"Failed to parse: bob:{PASSWORD}@proxy") == "Failed to parse: [key]@proxy"


@pytest.mark.parametrize("variable", TOKENS)
def test_a_token_is_said_nowhere(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "hf_abcdefghijk\n")
    assert show_controls("no hf_abcdefghijk here") == "no [key] here"


def test_a_placeholder_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert cut_secrets("EMPTY text") == "EMPTY text"


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("evil://bob:hunter2@proxy", "does not begin with http://, https://"),
        ("http://bob:hunter2@proxy:99999999", "is no address"),
        ("http://bob:hunter2@[proxy", "is no address"),
        ("http://bob:hunter2@", "names no host"),
        ("http://bob:hunter2@pro\x1b[2Jxy", "cannot be printed"),
        ("bob:hunter2@proxy:x", "is no address"),
    ],
)
def test_a_proxy_that_no_request_could_go_by_is_refused_unseen(
    address: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", address)
    with pytest.raises(ValueError, match="the environment variable ALL_PROXY ") as caught:
        check_proxies()
    assert problem in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("address", ["", "proxy:3128", "http://bob:hunter2@proxy:3128/", "https://proxy"])
def test_a_proxy_that_requests_can_go_by_is_let_pass(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", address)
    check_proxies()


def test_a_wrong_proxy_ends_a_command_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "evil://bob:hunter2@proxy")
    assert main(["generate", "some/model", "hi"]) == 2
    assert "HTTP_PROXY does not begin with" in capsys.readouterr().err


def test_a_host_that_no_name_can_be_is_refused(tmp_path: Path) -> None:
    settings = EndpointConfig(base_url="http://ho\x1bst/v1", model="m")
    with pytest.raises(ValueError, match=r"endpoint\.base_url: InvalidURL"):
        EndpointJudge(settings, Template(default_template("endpoint")), cache=tmp_path, log=print)


# ---- pipes ----


def test_a_pipe_is_refused_unopened(tmp_path: Path) -> None:
    """Where a template, a journal and a file beside weights may stand: opening a pipe waits for a writer."""
    from dpo.data.templates import read_template

    os.mkfifo(tmp_path / "verdicts.jsonl")
    with pytest.raises(ValueError, match=r"verdicts\.jsonl: must be a regular file, and is a pipe"):
        Journal(tmp_path / "verdicts.jsonl")
    with pytest.raises(
        ValueError, match=r"template .*verdicts\.jsonl: must be a regular file, and is a pipe"
    ):
        read_template(tmp_path / "verdicts.jsonl", name="template")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    os.mkfifo(model / "notes.txt")
    with pytest.raises(ValueError, match=r"notes\.txt: must be a regular file"):
        model_identity(str(model))
