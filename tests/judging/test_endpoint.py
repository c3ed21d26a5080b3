"""The endpoint judge against a real HTTP server on loopback, which answers as badly as servers do."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dpo.cli import main
from dpo.config import EndpointConfig
from dpo.files import WriteError
from dpo.judging import endpoint as endpoint_module
from dpo.judging import server as server_module
from dpo.judging.endpoint import EndpointJudge
from dpo.judging.judges import Question, Template
from dpo.judging.replies import seconds_asked_for
from dpo.outcomes import STOPPED_AT_ONCE, EnvironmentFailure, UserError


class Response(NamedTuple):
    """What the server sends."""

    status: int = 200
    body: bytes | None = None
    answer: str | None = "Good. [[A]]"
    finish_reason: str = "stop"
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    between_bytes: float = 0.0


class Server:
    """Answers request n with `script(n, body)`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.script: Callable[[int, dict[str, Any]], Response] = lambda number, body: Response()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.knocks: list[tuple[str, str | None]] = []
        self.knock_status = 404
        self.knock_drips = False
        """A header of the answer to a knock never ends."""
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.knocks.append((self.path, self.headers.get("Authorization")))
                self.send_response(server.knock_status)
                self.flush_headers()
                try:
                    while server.knock_drips:
                        self.wfile.write(b"X")
                        time.sleep(0.02)
                except (BrokenPipeError, ConnectionResetError):
                    return
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                response = server.begin(self.path, body, dict(self.headers))
                time.sleep(response.delay)
                content = response.body
                if content is None:
                    usage = {"prompt_tokens": 100, "completion_tokens": 7}
                    message = {"role": "assistant", "content": response.answer}
                    choice = {"message": message, "finish_reason": response.finish_reason}
                    content = json.dumps({"choices": [choice], "usage": usage}).encode()
                server.end()
                try:
                    self.send_response(response.status)
                    for name, value in response.headers:
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    if not response.between_bytes:
                        self.wfile.write(content)
                        return
                    for byte in content:
                        self.wfile.write(bytes([byte]))
                        time.sleep(response.between_bytes)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up waiting

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def begin(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Response:
        assert path == "/v1/chat/completions"
        with self._lock:
            self.requests.append(body)
            self.headers.append(headers)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            number = len(self.requests)
        return self.script(number, body)

    def end(self) -> None:
        with self._lock:
            self._now -= 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.close()


@pytest.fixture
def make_judge(server: Server, tmp_path: Path) -> Callable[..., EndpointJudge]:
    template = tmp_path / "template.jinja"
    log: list[str] = []
    template.write_text("{{ messages[0].content }}|{{ first }}|{{ second }}")

    def make(**settings: Any) -> EndpointJudge:
        config = EndpointConfig(base_url=server.url, model="m", concurrency=1, retries=2, backoff=0.01)
        judge_settings = replace(config, **settings)
        return EndpointJudge(judge_settings, Template(template), cache=tmp_path / "cache", log=log.append)

    make.log = log  # type: ignore[attr-defined]
    return make


def questions(count: int) -> list[Question]:
    return [Question(f"prompt {i}", "one", "two") for i in range(count)]


def test_a_request_is_a_chat_completion_with_the_key_from_the_environment(
    server: Server, make_judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-123\n")
    judge = make_judge(api_key_env="MY_KEY", options={"temperature": 0, "seed": 5})
    ((index, verdict),) = judge.ask(questions(1))
    assert (index, verdict.choice, verdict.answer) == (0, "first", "Good. [[A]]")
    assert verdict.details == {"cached": False, "prompt_tokens": 100, "completion_tokens": 7}
    message = {"role": "user", "content": "prompt 0|one|two"}
    assert server.requests == [{"model": "m", "messages": [message], "temperature": 0, "seed": 5}]
    assert server.headers[0]["Authorization"] == "Bearer secret-123"
    assert "secret" not in json.dumps(judge.identity)


def test_without_a_key_none_is_sent(server: Server, make_judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    list(make_judge(api_key_env="NO_KEY").ask(questions(1)))
    assert "Authorization" not in server.headers[0]


def test_nothing_is_asked_twice(server: Server, make_judge) -> None:
    """The cache holds malformed verdicts too (they were paid for), and another model's not."""
    server.script = lambda number, body: Response(answer="[[B]]" if number == 1 else "I like both")
    first = dict(make_judge().ask(questions(2)))
    again = dict(make_judge().ask(questions(2)))
    assert len(server.requests) == 2
    assert [again[i].choice for i in (0, 1)] == [first[i].choice for i in (0, 1)] == ["second", None]
    assert again[0].details["cached"] is True
    list(make_judge(model="other").ask(questions(1)))
    assert len(server.requests) == 3


def test_a_kept_reply_that_is_damaged_is_named(server: Server, make_judge, tmp_path: Path) -> None:
    list(make_judge().ask(questions(1)))
    (kept,) = (tmp_path / "cache").glob("*/*.json")
    kept.write_text("{")
    with pytest.raises(
        ValueError, match=r"\.json is no kept reply .* delete it, and the judge is asked again"
    ):
        list(make_judge().ask(questions(1)))


@pytest.mark.parametrize(
    "bad",
    [
        Response(status=429, headers=(("Retry-After", "0"),)),
        Response(status=500),
        Response(status=503, body=b"<html>busy</html>"),
        Response(body=b"not json"),
        Response(body=b'{"choices": []}'),
        Response(body=b'{"error": "overloaded"}'),
        Response(body=b"[1]"),
        Response(delay=0.4),
    ],
    ids=["429", "500", "503", "no json", "no choice", "error body", "a list", "time-out"],
)
def test_what_may_pass_is_tried_again(server: Server, make_judge, bad: Response) -> None:
    server.script = lambda number, body: bad if number == 1 else Response(answer="[[C]]")
    ((_, verdict),) = make_judge(timeout=0.2).ask(questions(1))
    assert verdict.choice == "tie"
    assert len(server.requests) == 2


def test_no_answer_after_all_retries_is_invalid_and_open(server: Server, make_judge) -> None:
    """It is neither cached nor final: the next start asks again."""
    server.script = lambda number, body: Response(status=503, body=b"busy")
    ((_, verdict),) = make_judge().ask(questions(1))
    assert (verdict.choice, verdict.was_asked) == (None, False)
    assert verdict.problem == "no answer: status 503 'busy'"
    assert len(server.requests) == 3
    server.script = lambda number, body: Response()
    ((_, verdict),) = make_judge().ask(questions(1))
    assert verdict.choice == "first"


def test_retry_after_is_obeyed_up_to_a_limit(
    server: Server, make_judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Response(status=429, headers=(("Retry-After", "0.3"),))
    server.script = lambda number, body: busy if number == 1 else Response()
    start = time.monotonic()
    list(make_judge().ask(questions(1)))
    assert time.monotonic() - start >= 0.3


def test_retry_after_is_a_date_too_and_may_be_long(
    server: Server, make_judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait over a minute is waited for (here with the clock's help) and said; over an hour it ends it."""
    later = formatdate(time.time() + 90, usegmt=True)
    assert 85 < seconds_asked_for({"Retry-After": later}) <= 90
    for text in ("", "soon", "-5", "1e9", "nan", formatdate(0), "Fri, 99 Foo 2026 10:00:00 GMT"):
        assert seconds_asked_for({"Retry-After": text}) == 0
    long = Response(status=429, headers=(("Retry-After", later),))
    server.script = lambda number, body: long if number == 1 else Response()
    waits: list[float] = []

    async def skip(self: server_module.Server, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(server_module.Server, "_pause", skip)
    ((_, verdict),) = make_judge().ask(questions(1))
    assert verdict.choice == "first"
    assert 80 < max(waits) <= 90, "not cut to the longest pause of our own"
    assert "asks to be left alone for" in make_judge.log[-1]
    server.script = lambda number, body: Response(status=503, headers=(("Retry-After", "7200"),))
    with pytest.raises(EnvironmentFailure, match="asks to be left alone for 120 minutes"):
        list(make_judge(model="other").ask(questions(1)))


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("I can't decide.", "no single verdict"),
        ("[[A]] [[B]]", "no single verdict"),
        (None, "no single verdict"),
    ],
)
def test_an_answer_without_a_verdict_is_invalid_and_kept(
    server: Server, make_judge, answer: str | None, problem: str
) -> None:
    server.script = lambda number, body: Response(answer=answer)
    ((_, verdict),) = make_judge().ask(questions(1))
    assert (verdict.choice, verdict.answer, verdict.was_asked) == (None, answer or "", True)
    assert verdict.problem.startswith(problem)
    assert len(server.requests) == 1


def test_an_answer_that_was_cut_off_is_no_verdict_now_and_from_the_cache(server: Server, make_judge) -> None:
    """What a model says on its way to a verdict is none."""
    cut = Response(answer="At first sight [[A]] is", finish_reason="length")
    server.script = lambda number, body: cut
    for _ in range(2):
        ((_, verdict),) = make_judge().ask(questions(1))
        assert (verdict.choice, verdict.was_asked) == (None, True)
        assert "cut off at its longest (max_tokens in endpoint.options)" in verdict.problem
    assert len(server.requests) == 1
    server.script = lambda number, body: cut._replace(answer="[[B]] at first sight")
    assert [verdict.choice for _, verdict in make_judge(model="other").ask(questions(1))] == ["second"]


def test_a_refused_question_is_invalid_and_the_rest_goes_on(server: Server, make_judge) -> None:
    server.script = lambda number, body: Response(status=400, body=b"too long") if number == 1 else Response()
    verdicts = dict(make_judge().ask(questions(2)))
    assert (verdicts[0].choice, verdicts[0].was_asked) == (None, False)
    assert verdicts[0].problem == "refused with status 400: 'too long'"
    assert verdicts[1].choice == "first"


@pytest.mark.parametrize(
    ("status", "setting"), [(401, "api_key_env"), (404, "base_url or endpoint.model"), (301, "base_url")]
)
def test_a_wrong_setting_stops_at_once(server: Server, make_judge, status: int, setting: str) -> None:
    server.script = lambda number, body: Response(status=status, body=b"no")
    with pytest.raises(ValueError, match=rf"answered {status} 'no'; see endpoint\.{setting}"):
        list(make_judge().ask(questions(50)))
    assert len(server.requests) < 5


def test_a_server_that_is_gone_stops_the_command(server: Server, make_judge) -> None:
    """It is tried for as long as `patience` says, with one line about it."""
    judge = make_judge(base_url="http://127.0.0.1:9/v1", patience=0.3, concurrency=4)
    start = time.monotonic()
    with pytest.raises(
        EnvironmentFailure, match=r"could not be reached for 0\.3 s .*the same command goes on"
    ):
        list(judge.ask(questions(100)))
    assert 0.3 <= time.monotonic() - start < 3
    (line,) = make_judge.log
    assert "127.0.0.1:9" in line
    assert "trying for 0.3 s to reach it" in line


def test_an_answer_to_a_knock_that_never_ends_is_let_pass(
    server: Server, make_judge: Callable[..., EndpointJudge]
) -> None:
    server.knock_drips = True
    begun = time.monotonic()
    make_judge(timeout=0.2).require_usable()
    assert time.monotonic() - begun < 10
    server.knock_drips = False


@pytest.mark.parametrize("status", [200, 404, 405, 500])
def test_a_server_is_knocked_at_with_the_key_and_asked_nothing(
    server: Server, make_judge, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Whether it has a list of models is its own affair."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    server.knock_status = status
    make_judge().require_usable()
    assert server.knocks == [("/v1/models", "Bearer sk-test")]
    assert server.requests == []


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (401, UserError, r"answered 401; see endpoint\.api_key_env"),
        (403, UserError, r"answered 403; see endpoint\.api_key_env"),
        (402, EnvironmentFailure, "answered 402; it wants to be paid"),
    ],
)
def test_a_key_that_is_refused_is_found_at_the_door(
    server: Server, make_judge, status: int, error: type[Exception], said: str
) -> None:
    server.knock_status = status
    with pytest.raises(error, match=said):
        make_judge().require_usable()


def test_a_server_that_is_gone_is_found_at_the_door(make_judge) -> None:
    with pytest.raises(EnvironmentFailure, match=r"could not be reached for 0\.2 s"):
        make_judge(base_url="http://127.0.0.1:9/v1", patience=0.2).require_usable()


def test_nothing_is_sampled_for_a_judge_that_does_not_answer(
    server: Server, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.knock_status = 401
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    command = [
        "winrate", f"--policy={tiny_model_dir}", "--opponent=data:best", f"--data={data}", f"--output={out}",
        "--judge=endpoint", f"--endpoint.base_url={server.url}", "--endpoint.model=m",
    ]  # fmt: skip
    assert main(command) == 2
    assert "answered 401; see endpoint.api_key_env" in capsys.readouterr().err
    assert not (out / "samples.jsonl").exists()


def test_a_reply_that_drips_or_swells_is_no_answer(server: Server, make_judge) -> None:
    """The limit is on the whole exchange, not on each read; compressed or not, a reply has a size."""
    drip, bomb = Response(between_bytes=0.05), gzip.compress(bytes(2**24))
    server.script = lambda number, body: drip if number == 1 else Response()
    start = time.monotonic()
    ((_, verdict),) = make_judge(timeout=0.3).ask(questions(1))
    assert verdict.choice == "first"
    assert time.monotonic() - start < 2
    for headers in ((("Content-Encoding", "gzip"),), ()):
        content = bomb if headers else bytes(2**23)
        server.script = lambda number, body, c=content, h=headers: Response(body=c, headers=h)
        ((_, verdict),) = make_judge(retries=0, model=f"m{len(headers)}").ask(questions(1))
        assert (verdict.choice, verdict.was_asked) == (None, False)
        assert "a reply of more than 4194304 bytes" in verdict.problem


@contextmanager
def ctrl_c_once(is_time: Callable[[], bool]) -> Iterator[None]:
    """Ctrl-C soon after something is so; what is inside has to end within five seconds from then on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of the tests ignores it
    given, over = [], threading.Event()

    def wait() -> None:
        while not is_time() and not over.wait(0.02):
            pass
        if not over.wait(0.3):
            given.append(time.monotonic())
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        yield
    finally:
        over.set()
        waiting.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - given[0] < 5


def test_ctrl_c_ends_at_once_while_replies_drip(server: Server, make_judge) -> None:
    server.script = lambda number, body: Response(between_bytes=0.4)
    judge = make_judge(timeout=60.0, concurrency=4)
    with ctrl_c_once(lambda: bool(server.requests)), pytest.raises(KeyboardInterrupt):
        list(judge.ask(questions(8)))


def test_ctrl_c_ends_the_command_with_130_while_a_header_drips(
    server: Server, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.knock_drips = True
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    command = [
        "winrate", f"--policy={tiny_model_dir}", "--opponent=data:best", f"--data={data}", f"--output={out}",
        "--judge=endpoint", f"--endpoint.base_url={server.url}", "--endpoint.model=m",
        "--endpoint.timeout=600",
    ]  # fmt: skip
    try:
        with ctrl_c_once(lambda: bool(server.knocks)):
            assert main(command) == STOPPED_AT_ONCE.code == 130
    finally:
        server.knock_drips = False
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (402, b'{"error": {"message": "pay first"}}'),
        (429, b'{"error": {"message": "pay first: insufficient_quota"}}'),
        (429, b'{"error": {"message": "You must pay first", "type": "insufficient_quota", "param": null}}'),
    ],
)
def test_without_credit_it_stops_and_the_rest_is_asked_after_paying(
    server: Server, make_judge, status: int, content: bytes
) -> None:
    broke = Response(status=status, body=content)
    server.script = lambda number, body: Response() if number <= 2 else broke
    given = []
    with pytest.raises(EnvironmentFailure, match=rf"answered {status} '.*pay first.*same command asks again"):
        given.extend(make_judge().ask(questions(5)))
    assert len(server.requests) == 3
    server.script = lambda number, body: Response()
    verdicts = dict(make_judge().ask(questions(5)))
    assert [verdicts[i].choice for i in range(5)] == ["first"] * 5
    assert len(server.requests) == 6, "two were kept"


def test_settings_that_a_server_refuses_stop_it_with_its_message(server: Server, make_judge) -> None:
    refused = Response(status=400, body=b'{"error": {"message": "temperature is not supported"}}')
    server.script = lambda number, body: refused
    with pytest.raises(ValueError, match=r"refused 4 questions in a row .* 'temperature is not supported'"):
        list(make_judge().ask(questions(50)))
    assert len(server.requests) == 4


def test_a_model_that_wants_max_completion_tokens_gets_it(server: Server, make_judge) -> None:
    """One question finds out; the kept replies are those of the settings as they are."""
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."

    def answer(number: int, body: dict[str, Any]) -> Response:
        return Response(status=400, body=message.encode()) if "max_tokens" in body else Response()

    server.script = answer
    verdicts = dict(make_judge(options={"max_tokens": 9}).ask(questions(3)))
    assert [verdicts[i].choice for i in range(3)] == ["first"] * 3
    assert [body.get("max_completion_tokens") for body in server.requests] == [None, 9, 9, 9]
    list(make_judge(options={"max_tokens": 9}).ask(questions(3)))
    assert len(server.requests) == 4


def test_a_cache_that_cannot_keep_replies_is_found_before_they_are_paid_for(
    server: Server, make_judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = make_judge()
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(endpoint_module.shutil, "disk_usage", lambda path: full)
        with pytest.raises(WriteError, match=r"has 1,000 bytes free.*nothing was asked; endpoint\.cache"):
            list(judge.ask(questions(1)))
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(WriteError, match="nothing was asked"):
        list(judge.ask(questions(1)))
    assert not server.requests


def test_a_cache_that_fills_up_stops_it_and_the_verdict_is_not_lost(
    server: Server, make_judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(endpoint_module.os, "replace", full)
    given = []
    with pytest.raises(WriteError, match=r"a reply could not be written .*No space left"):
        given.extend(make_judge().ask(questions(5)))
    assert [verdict.choice for _, verdict in given] == ["first"]
    assert len(server.requests) == 1


def test_requests_run_side_by_side_and_verdicts_keep_their_question(server: Server, make_judge) -> None:
    def answer(number: int, body: dict[str, Any]) -> Response:
        even = int(body["messages"][0]["content"].split("|")[0].split()[1]) % 2 == 0
        return Response(answer="[[A]]" if even else "[[B]]", delay=0.05)

    server.script = answer
    verdicts = dict(make_judge(concurrency=4).ask(questions(12)))
    assert [verdicts[i].choice for i in range(12)] == ["first", "second"] * 6
    assert 1 < server.most_at_once <= 4


def test_a_win_rate_by_an_endpoint_counts_tokens_and_cost(
    server: Server, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through bad luck of every kind; what is paid for is every answer that was had, once."""
    bad = [
        Response(status=429, headers=(("Retry-After", "0"),)),
        Response(body=b"not json"),
        Response(status=503),
        Response(delay=0.6),
    ]

    def answer(number: int, body: dict[str, Any]) -> Response:
        return bad[number] if number < len(bad) else Response(answer="[[A]]")

    server.script = answer
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [{"prompt": f"prompt {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "winrate", f"--policy={tiny_model_dir}", "--opponent=data:best", f"--data={data}", f"--output={out}",
        "--max_new_tokens=4", "--judge=endpoint", f"--endpoint.base_url={server.url}", "--endpoint.model=m",
        "--endpoint.backoff=0.01", "--endpoint.timeout=0.5", f"--endpoint.cache={tmp_path / 'cache'}",
        "--endpoint.price_input=3", "--endpoint.price_output=15",
    ]  # fmt: skip
    assert main(command) == 0
    usage = {"answers": 8, "from_cache": 0, "unreported": 0, "prompt_tokens": 800, "completion_tokens": 56}
    expected = pytest.approx((800 * 3 + 56 * 15) / 1e6)
    result = json.loads((out / "winrate.json").read_text())
    assert result["usage"] == usage | {"cost": expected}
    assert result["temperatures"]["1.0"]["ties_flipped"] == 4, "a judge that always says first"
    assert len(server.requests) == 8 + len(bad) - 1  # the script counts from 1
    printed = capsys.readouterr().out
    assert "decides by position" in printed
    assert "8 answers, 0 of them from the cache; 800 prompt and 56 completion tokens, cost 0.00324" in printed

    # the same verdicts again cost nothing more; in another place the cache answers
    assert main(command) == 0
    assert json.loads((out / "winrate.json").read_text())["usage"] == usage | {"cost": expected}
    assert main([*command, f"--output={tmp_path / 'elsewhere'}"]) == 0
    elsewhere = json.loads((tmp_path / "elsewhere" / "winrate.json").read_text())["usage"]
    nothing = dict.fromkeys(("unreported", "prompt_tokens", "completion_tokens", "cost"), 0)
    assert elsewhere == {"answers": 8, "from_cache": 8} | nothing
    assert len(server.requests) == 8 + len(bad) - 1


@pytest.mark.parametrize("setting", ["base_url", "model"])
def test_address_and_model_are_needed(make_judge, setting: str) -> None:
    with pytest.raises(ValueError, match=f"endpoint.{setting} is not given"):
        make_judge(**{setting: None})
    with pytest.raises(ValueError, match="allowed: http:// or https://"):
        EndpointConfig(base_url="localhost:8000")
