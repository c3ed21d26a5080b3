"""A judge behind an OpenAI-compatible endpoint: hosted services, vLLM, llama.cpp, Ollama and others.

Every reply is kept on disk under a hash of the request, so that no question is paid for twice. Some requests
run at a time. What can pass (429, 5xx, time-outs, broken connections, replies that are no completion) is
tried again with growing pauses; what cannot (a wrong key or address, no credit) stops the command, and the
same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import httpx2 as httpx

from dpo.config import EndpointConfig, WinrateConfig
from dpo.data.templates import LIMITS
from dpo.files import WriteError, writing
from dpo.huggingface.embedded import cache_directory
from dpo.judging.answers import read_answer
from dpo.judging.background import in_background
from dpo.judging.judges import (
    Counted,
    JudgeIdentity,
    Log,
    Question,
    Template,
    Verdict,
    default_template,
)
from dpo.judging.keys import read_key
from dpo.judging.replies import Completion, read_kept
from dpo.judging.server import Server
from dpo.outcomes import UserError, raising_user_errors
from dpo.proxies import check_proxies

ROOM_FOR_REPLY = 16 * 2**10
"""Bytes on the disk of the cache that a reply may take, its directory included."""


class EndpointJudge:
    """Asks `settings.model` at `settings.base_url` for verdicts."""

    scores_each: ClassVar[bool] = False

    def __init__(self, settings: EndpointConfig, template: Template, *, cache: Path, log: Log) -> None:
        """Raises `ValueError` when base_url or model is missing, or the key is none that can be sent."""
        if settings.base_url is None or settings.model is None:
            missing = "base_url" if settings.base_url is None else "model"
            raise UserError(f"endpoint.{missing} is not given; --judge endpoint needs it")
        self._settings, self._template, self._cache, self._log = settings, template, cache, log
        self._url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self._key = read_key(settings.api_key_env)
        check_proxies()
        with raising_user_errors("endpoint.base_url"):  # of a host that no name can be
            httpx.URL(self._url)
        warning = self._key.warning(self._url)
        if warning is not None:
            log(warning)

    @property
    def identity(self) -> JudgeIdentity:
        """Address, model, options and template."""
        identity: JudgeIdentity = {
            "judge": "endpoint",
            "url": self._url,
            "model": self._settings.model,
            "options": self._settings.options,
            "template": self._template.sha256,
        }
        return self._key.cut_from_value(identity)

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts as they come in, `concurrency` questions at a time.

        Raises:
          UserError: for settings that the server refuses.
          EnvironmentFailure: for a server that cannot be reached, does not answer, or wants to be paid. The
            verdicts before it were given.
          WriteError: when replies cannot be kept: before anything is asked, where that shows.
        """
        require_room(self._cache, len(questions))
        server = Server(self._settings, self._url, self._key, self._log)
        remaining = iter(enumerate(questions))

        async def work(client: httpx.AsyncClient, give: Callable[[tuple[int, Verdict]], None]) -> None:
            for index, question in remaining:
                answered = await self._judge(client, server, question)
                give((index, answered.verdict))
                if answered.not_kept is not None:
                    raise answered.not_kept

        async def ask_all(give: Callable[[tuple[int, Verdict]], None]) -> None:
            async with self._client() as client:
                await server.run(work(client, give) for _ in range(self._settings.concurrency))

        yield from in_background(ask_all)

    def require_usable(self) -> None:
        """See that the server is there and takes the key, and that replies can be kept.

        Raises:
          UserError: for a key that it refuses.
          EnvironmentFailure: for a server that cannot be reached, or wants to be paid.
          WriteError: for a cache that cannot be written to.
        """
        require_room(self._cache, 0)
        server = Server(self._settings, self._url, self._key, self._log)

        async def knock(give: Callable[[None], None]) -> None:
            async with self._client() as client:
                await server.knock(client, f"{self._url.removesuffix('/chat/completions')}/models")

        for _ in in_background(knock):
            pass

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            timeout=None,  # `receive` has one for the whole exchange
            headers=self._key.headers | {"Accept-Encoding": "identity"},
            limits=httpx.Limits(max_connections=self._settings.concurrency),
        )

    async def _judge(self, client: httpx.AsyncClient, server: Server, question: Question) -> _Answered:
        message = {"role": "user", "content": self._template.render(question)}
        body = {"model": self._settings.model, "messages": [message], **self._settings.options}
        path = self._cache_path(body)
        if path.is_file():
            return _Answered(_verdict(read_kept(path), cached=True))
        reply = await server.request(client, body)
        if isinstance(reply, Verdict):
            return _Answered(reply)
        reply = reply._replace(answer=self._key.cut_from(reply.answer))
        try:
            _keep(path, reply)
        except WriteError as error:
            return _Answered(_verdict(reply, cached=False), error)
        return _Answered(_verdict(reply, cached=False))

    def _cache_path(self, body: Mapping[str, Any]) -> Path:
        content = json.dumps({"url": self._url, "body": body}, sort_keys=True)
        name = hashlib.sha256(content.encode()).hexdigest()
        return self._cache / name[:2] / f"{name}.json"


class _Answered(NamedTuple):
    """A verdict, and why its reply could not be kept."""

    verdict: Verdict
    not_kept: WriteError | None = None


def open_endpoint(given: WinrateConfig, source: str, log: Log) -> EndpointJudge:
    """The judge that the settings under `endpoint` describe."""
    del source
    cache = Path(given.endpoint.cache or cache_directory() / "judge").expanduser()
    characters = given.template_characters or LIMITS.characters
    template = Template(given.template or default_template("endpoint"), characters=characters)
    return EndpointJudge(given.endpoint, template, cache=cache, log=log)


def command_line_settings(identity: JudgeIdentity) -> dict[str, object]:
    """What asks the same endpoint again, besides its key."""
    if not ("url" in identity and "model" in identity and "options" in identity):
        raise UserError("an endpoint's verdicts have no address, model or options; run dpo winrate again")
    return {
        "endpoint.base_url": identity["url"].removesuffix("/chat/completions"),
        "endpoint.model": identity["model"],
        "endpoint.options": identity["options"],
    }


def require_room(cache: Path, num_replies: int) -> None:
    """Refuse a cache that cannot be written to, or has no room, before anything is paid for.

    Raises:
      WriteError: with the path, and the reason.
    """
    note = "nothing was asked; endpoint.cache names another place"
    with writing("the judge's replies", cache, note=note):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as probe:
            probe.write(bytes(4096))
            probe.flush()
        free, needed = shutil.disk_usage(cache).free, num_replies * ROOM_FOR_REPLY
    if free < needed:
        raise WriteError(
            f"{cache} has {free:,} bytes free, and {num_replies} replies may take {needed:,}; {note}"
        )


def _keep(path: Path, reply: Completion) -> None:
    with writing("a reply", path, note="it is among the verdicts, and what was answered before is kept"):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(reply._asdict(), ensure_ascii=False), encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def _verdict(reply: Completion, *, cached: bool) -> Verdict:
    choice = read_answer(reply.answer, is_cut=reply.is_cut)
    details: Counted = {
        "cached": cached,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
    }
    problem = None if choice else "no single verdict [[A]], [[B]] or [[C]] in the answer"
    if problem is not None and reply.is_cut:
        problem += ", which was cut off at its longest (max_tokens in endpoint.options)"
    return Verdict(choice, reply.answer, problem, details=details)
