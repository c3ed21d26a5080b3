"""A key goes into the header of a request and nowhere else, whatever a server does with it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from dpo.cli import main
from dpo.config import EndpointConfig
from dpo.judging.keys import Key, read_key

SECRET = 'sk-"proj"-wXyQ/Qz+77'


@pytest.mark.parametrize(
    ("value", "what"),
    [("sk-abc\nX-Evil: 1", "a line break after 6"), ("sk abc", "a space after 2"), ("sk-ä", "'ä' after 3")],
)
def test_a_key_that_no_header_carries_is_refused_unseen(
    monkeypatch: pytest.MonkeyPatch, value: str, what: str
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ValueError, match=f"environment variable MY_KEY has {what}") as caught:
        read_key("MY_KEY")
    assert "abc" not in str(caught.value)


def test_a_key_is_cut_out_in_every_spelling() -> None:
    key = Key(SECRET, "MY_KEY")
    for spelling in (SECRET, json.dumps(SECRET), quote(SECRET, safe="")):
        cut = key.cut_from(f"key {spelling}.")
        assert "wXyQ" not in cut
        assert "[key]" in cut
    assert key.cut_from_value({SECRET: [1, SECRET, None]}) == {"[key]": [1, "[key]", None]}
    assert Key("A", "MY_KEY").cut_from("[[A]]") == "[[A]]", "a placeholder is no secret"
    assert Key(None, "MY_KEY").cut_from("text") == "text"


@pytest.mark.parametrize(
    ("url", "warns"),
    [
        ("http://example.com/v1", True),
        ("http://10.0.0.7:8000/v1", True),
        ("https://example.com/v1", False),
        ("http://localhost:8000/v1", False),
        ("http://127.0.0.2/v1", False),
        ("http://[::1]:8000/v1", False),
    ],
)
def test_a_key_in_the_open_is_warned_of(url: str, warns: bool) -> None:
    warning = Key(SECRET, "MY_KEY").warning(url)
    assert (warning is not None) is warns
    assert warning is None or (SECRET not in warning and "use https://" in warning)
    assert Key(None, "MY_KEY").warning(url) is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:hunter2@example.com/v1", "with a user or a password in it"),
        ("https://hunter2@example.com/v1", "with a user or a password in it"),
        ("ftp://me:hunter2@example.com", "allowed: http:// or https:// addresses"),
        ("https://example.com/v1?api_key=hunter2", r"with a query"),
        ("https://me:hunter2@[::1", "which is no address"),
        ("http://", "allowed: http:// or https:// addresses"),
        ("http://me:hunter2@host:port/v1", "which is no address"),
        ("me:hunter2@example.com/v1", "allowed: http:// or https:// addresses"),
        ("http:\\\\me:hunter2@example.com", "allowed: http:// or https:// addresses"),
        ("http://me:hunter2/3?4@example.com/v1", "which is no address"),
        ("https://example.com/v1#hunter2", r"with a query"),
    ],
)
def test_secrets_in_an_address_are_refused_unseen(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        EndpointConfig(base_url=url)
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that says back what it was told: in answers, and, for every third request, in errors."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    count = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            count[0] += 1
            told = self.headers["Authorization"]
            if count[0] % 3 == 0:
                status, said = 400, {"error": {"message": f"no {told} here, nor {quote(told)}"}}
            else:
                status, said = 200, {"choices": [{"message": {"content": f"You are {told}. [[A]]"}}]}
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_sink_holds_the_key(
    parrot: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Verdicts, results, kept replies, the terminal, an error that ends the command: all files are read."""
    monkeypatch.setenv("MY_KEY", SECRET)
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"prompt {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "winrate", f"--policy={tiny_model_dir}", "--opponent=data:best", f"--data={data}",
        f"--output={tmp_path / 'out'}", "--max_new_tokens=4", "--judge=endpoint", "--endpoint.model=m",
        f"--endpoint.base_url={parrot}", "--endpoint.api_key_env=MY_KEY", "--endpoint.concurrency=1",
        f"--endpoint.cache={tmp_path / 'cache'}",
        "--endpoint.options", json.dumps({"max_tokens": 5, "user": SECRET}),
    ]  # fmt: skip
    assert main(command) == 0
    monkeypatch.setattr("dpo.judging.server.REFUSALS", 1)
    other = [*command, f"--output={tmp_path / 'other'}", "--endpoint.model=n"]
    assert main(other) == 2, "it ends in the server's message"
    captured = capsys.readouterr()
    assert "no Bearer [key] here" in captured.err
    written = [path.read_bytes().decode() for path in tmp_path.rglob("*") if path.is_file()]
    assert sum("[key]" in text for text in written) > 3, "the server did say it"
    for text in [captured.out, captured.err, *written]:
        assert "wXyQ" not in text
