"""A judge behind an OpenAI-compatible endpoint: hosted services, vLLM, llama.cpp, Ollama and others.

Every reply is kept on disk under a hash of the request, so that no question is paid for twice. Requests run
in a few threads; what can pass (429, 5xx, time-outs, broken connections, replies that are no completion) is
tried again with growing pauses; what cannot (a wrong key or address) stops the command.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import httpx2 as httpx

from dpo.config import EndpointConfig, WinrateConfig
from dpo.huggingface.embedded import cache_directory
from dpo.judging.judges import Log, Question, Template, Verdict, default_template, read_answer
from dpo.outcomes import UserError

GIVE_UP_AFTER = 8
"""So many questions in a row without any answer, all retries included, stop the command."""
LONGEST_PAUSE = 60.0
"""Seconds: no pause between two tries is longer, whatever the server asks for."""
_PASSING = {408, 409, 425, 429}
_WRONG_SETTING = {401: "api_key_env", 403: "api_key_env", 404: "base_url or endpoint.model"}


class EndpointJudge:
    """Asks `settings.model` at `settings.base_url` for verdicts."""

    scores_each: ClassVar[bool] = False

    def __init__(self, settings: EndpointConfig, template: Template, *, cache: Path) -> None:
        """Raises `ValueError` when base_url or model is missing."""
        if settings.base_url is None or settings.model is None:
            missing = "base_url" if settings.base_url is None else "model"
            raise UserError(f"endpoint.{missing} is not given; --judge endpoint needs it")
        self._settings, self._template, self._cache = settings, template, cache
        self._url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._unanswered = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Address, model, options and template."""
        return {
            "judge": "endpoint",
            "url": self._url,
            "model": self._settings.model,
            "options": self._settings.options,
            "template": self._template.sha256,
        }

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts as they come in, `concurrency` questions at a time.

        Raises:
          ValueError: for an answer that no retry would change, and when GIVE_UP_AFTER questions in a row had
            none; the verdicts before it were given.
        """
        self._stopped.clear()
        settings, pool = self._settings, ThreadPoolExecutor(self._settings.concurrency)
        with httpx.Client(timeout=settings.timeout, headers=self._headers()) as client:
            futures = {pool.submit(self._judge, client, q): i for i, q in enumerate(questions)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)

    def _headers(self) -> dict[str, str]:
        """The key stays in the environment and in this header; a local server may need none."""
        key = os.environ.get(self._settings.api_key_env, "").strip()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _judge(self, client: httpx.Client, question: Question) -> Verdict:
        message = {"role": "user", "content": self._template.render(question)}
        body = {"model": self._settings.model, "messages": [message], **self._settings.options}
        path = self._cache_path(body)
        if path.is_file():
            return _verdict(_read_reply(path), cached=True)
        reply = self._request(client, body)
        if isinstance(reply, Verdict):
            return reply
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{threading.get_ident()}")
        beside.write_text(json.dumps(reply._asdict(), ensure_ascii=False), encoding="utf-8")
        os.replace(beside, path)
        return _verdict(reply, cached=False)

    def _request(self, client: httpx.Client, body: dict[str, Any]) -> _Reply | Verdict:
        """A completion, or the invalid verdict that stands for having none."""
        problem = "the command was stopped"
        for attempt in range(self._settings.retries + 1):
            if self._stopped.is_set():
                break
            pause = self._settings.backoff * 2**attempt * random.uniform(0.5, 1.0)
            try:
                response = client.post(self._url, json=body)
            except httpx.TimeoutException:
                problem = f"no answer within {self._settings.timeout:g} s"
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                outcome = self._read(response)
                if not isinstance(outcome, str):
                    with self._lock:
                        self._unanswered = 0
                    return outcome
                problem, pause = outcome, max(pause, _seconds_asked_for(response))
            if attempt < self._settings.retries:
                self._stopped.wait(min(pause, LONGEST_PAUSE))
        return self._no_answer(problem)

    def _no_answer(self, problem: str) -> Verdict:
        with self._lock:
            self._unanswered += 1
            too_many = self._unanswered >= GIVE_UP_AFTER and not self._stopped.is_set()
        if too_many:
            self._stopped.set()
            raise UserError(
                f"{self._url}: {GIVE_UP_AFTER} questions in a row had no answer after "
                f"{self._settings.retries} retries each; the last: {problem}. What was answered is kept"
            )
        return Verdict(None, "", f"no answer: {problem}", was_asked=False)

    def _read(self, response: httpx.Response) -> _Reply | Verdict | str:
        """A completion; or an invalid verdict that is final; or, as text, what may pass."""
        status, shown = response.status_code, response.text[:300]
        if status in _WRONG_SETTING or 300 <= status < 400:
            setting = _WRONG_SETTING.get(status, "base_url")
            self._stopped.set()
            raise UserError(f"{self._url} answered {status} {shown!r}; see endpoint.{setting}")
        if status in _PASSING or status >= 500:
            return f"status {status} {shown!r}"
        if status >= 400:
            return Verdict(None, shown, f"refused with status {status}")
        try:
            content = response.json()
            answer, usage = content["choices"][0]["message"]["content"], content.get("usage") or {}
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, TypeError, LookupError, AttributeError):
            return f"not a chat completion: {shown!r}"
        return _Reply(answer if isinstance(answer, str) else "", *counts)

    def _cache_path(self, body: dict[str, Any]) -> Path:
        content = json.dumps({"url": self._url, "body": body}, sort_keys=True)
        name = hashlib.sha256(content.encode()).hexdigest()
        return self._cache / name[:2] / f"{name}.json"


def open_endpoint(given: WinrateConfig, source: str, log: Log) -> EndpointJudge:
    """The judge that the settings under `endpoint` describe."""
    del source, log
    cache = Path(given.endpoint.cache or cache_directory() / "judge")
    template = Template(given.template or default_template("endpoint"))
    return EndpointJudge(given.endpoint, template, cache=cache)


def command_line_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What asks the same endpoint again, besides its key."""
    return {
        "endpoint.base_url": identity["url"].removesuffix("/chat/completions"),
        "endpoint.model": identity["model"],
        "endpoint.options": identity["options"],
    }


class _Reply(NamedTuple):
    """What is kept of a completion."""

    answer: str
    prompt_tokens: int
    completion_tokens: int


def _read_reply(path: Path) -> _Reply:
    try:
        return _Reply(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is no kept reply ({error}); delete it, and the judge is asked again"
        ) from error


def _verdict(reply: _Reply, *, cached: bool) -> Verdict:
    choice = read_answer(reply.answer)
    details = {
        "cached": cached,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
    }
    problem = None if choice else "no single verdict [[A]], [[B]] or [[C]] in the answer"
    return Verdict(choice, reply.answer, problem, details=details)


def _seconds_asked_for(response: httpx.Response) -> float:
    """The Retry-After header where it is a number of seconds."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.replace(".", "", 1).isdecimal() else 0.0
