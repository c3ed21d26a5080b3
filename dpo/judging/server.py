"""One server while it is asked: patience with what can pass, and an end to what cannot."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any

import httpx2 as httpx

from dpo.config import EndpointConfig
from dpo.judging.judges import Log, Verdict
from dpo.judging.keys import Key
from dpo.judging.replies import (
    Completion,
    MalformedReplyError,
    Received,
    parse_completion,
    receive,
    seconds_asked_for,
    server_message,
)
from dpo.outcomes import EnvironmentFailure, UserError

GIVE_UP_AFTER = 8
"""So many questions in a row without any answer, all retries included, stop the command."""
REFUSALS = 4
"""So many questions in a row that the server calls wrong stop the command: it is the settings, not they."""
LONGEST_PAUSE = 60.0
"""Seconds: no pause of our own choice between two tries is longer."""
LONGEST_WAIT = 3600.0
"""Seconds that a server may ask to be left alone for; a longer wait stops the command instead."""
TELL_FROM = 10.0
"""Seconds: a longer wait is said."""
BETWEEN_KNOCKS = 5.0
"""Seconds at most between two tries to connect."""
_KEPT = "What was answered is kept, and the same command goes on from there"
_PASSING = {408, 409, 425, 429}
_STOPPING = {
    401: "see endpoint.api_key_env",
    402: "it wants to be paid; the same command asks again what is open",
    403: "see endpoint.api_key_env",
    404: "see endpoint.base_url or endpoint.model",
}
_NO_CREDIT = b"insufficient_quota"
"""What some services say of an empty account beside their message, with a 429 that no wait changes."""


class Server:
    """What all requests to one server know of it."""

    def __init__(self, settings: EndpointConfig, url: str, key: Key, log: Log) -> None:
        self._settings, self._url, self._key, self._log = settings, url, key, log
        self._stopped = asyncio.Event()
        self._unanswered = self._refused = 0
        """Questions in a row without an answer, and in a row that were called wrong."""
        self._not_before = 0.0
        """When the server may be asked again (of time.monotonic)."""
        self._unreachable_since: float | None = None
        self._renames_limit = False
        """The model wants its limit of tokens by the newer name."""

    async def run(self, workers: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Let workers ask until all are done, or one ends in an error, which is raised.

        The others then end their present request and begin no other: what it costs is spent already.
        """
        found = await asyncio.gather(*(self._stopping(work) for work in workers), return_exceptions=True)
        for error in found:
            if error is not None and not isinstance(error, _StoppedError):
                raise error

    async def knock(self, client: httpx.AsyncClient, url: str) -> None:
        """See that the server is reached and takes the key, by a question that costs nothing.

        What else it answers is let pass, an answer without end too: a server need not have this address.

        Raises:
          UserError: for a key that it refuses.
          EnvironmentFailure: for a server that cannot be reached, or wants to be paid.
        """
        while True:
            seconds = self._settings.timeout
            try:  # `timeout` is of connecting, and of every read
                async with (
                    asyncio.timeout(2 * seconds),
                    client.stream("GET", url, timeout=seconds) as response,
                ):
                    status = response.status_code
                break
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                await self._wait_for_connection(str(error))
            except (httpx.TransportError, TimeoutError):
                return  # it was reached; what it says to a question is another matter
        if status in (401, 402, 403):
            raise _error_of(status)(f"{url} answered {status}; {_STOPPING[status]}")

    async def request(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Completion | Verdict:
        """A completion, or the invalid verdict that stands for having none.

        Raises:
          UserError: for settings that the server refuses.
          EnvironmentFailure: for a server that cannot be reached, does not answer, or wants to be paid.
        """
        problem = ""
        for attempt in range(self._settings.retries + 1):
            outcome = await self._try(client, body)
            if not isinstance(outcome, str):
                return outcome
            problem = self._key.cut_from(outcome)
            if attempt < self._settings.retries:
                pause = self._settings.backoff * 2**attempt * random.uniform(0.5, 1.0)
                await self._pause(min(pause, LONGEST_PAUSE))
        return self._no_answer(problem)

    async def _try(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Completion | Verdict | str:
        """What the server says once it is reached: an outcome, or, as text, what may pass."""
        while True:
            await self._pause(self._not_before - time.monotonic())
            sent = _rename_limit(body) if self._renames_limit else body
            try:
                received = await receive(client, self._url, sent, seconds=self._settings.timeout)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                await self._wait_for_connection(str(error))
                continue
            except TimeoutError:
                return f"no answer within {self._settings.timeout:g} s"
            except httpx.TransportError as error:
                return f"{type(error).__name__}: {error}"
            except MalformedReplyError as error:
                return str(error)
            self._unreachable_since = None
            if _wants_other_limit(received, sent):
                self._renames_limit = True
                continue
            return self._read(received)

    def _read(self, received: Received) -> Completion | Verdict | str:
        status, said = received.status, self._key.cut_from(server_message(received.content))
        has_no_credit = status == 429 and _NO_CREDIT in received.content
        if status in _STOPPING or 300 <= status < 400 or has_no_credit:
            way_out = _STOPPING.get(402 if status == 429 else status, "see endpoint.base_url")
            raise _error_of(status)(f"{self._url} answered {status} {said!r}; {way_out}. {_KEPT}")
        if status in _PASSING or status >= 500:
            self._leave_alone(seconds_asked_for(received.headers))
            return f"status {status} {said!r}"
        if status >= 400:
            return self._refuse(status, said)
        try:
            completion = parse_completion(received.content)
        except MalformedReplyError as error:
            return str(error)
        self._unanswered = self._refused = 0
        return completion

    def _refuse(self, status: int, said: str) -> Verdict:
        """The question is wrong for this server, or, where several are in a row, the settings are."""
        self._refused += 1
        if self._refused >= REFUSALS:
            raise UserError(
                f"{self._url} refused {REFUSALS} questions in a row with status {status}: {said!r}; see "
                f"endpoint.options, endpoint.model and template. {_KEPT}"
            )
        return Verdict(None, said, f"refused with status {status}: {said!r}", was_asked=False)

    def _no_answer(self, problem: str) -> Verdict:
        self._unanswered += 1
        if self._unanswered >= GIVE_UP_AFTER:
            raise EnvironmentFailure(
                f"{self._url}: {GIVE_UP_AFTER} questions in a row had no answer after "
                f"{self._settings.retries} retries each; the last: {problem}. {_KEPT}"
            )
        return Verdict(None, "", f"no answer: {problem}", was_asked=False)

    def _leave_alone(self, seconds: float) -> None:
        """No request of any worker for so long."""
        if seconds > LONGEST_WAIT:
            raise EnvironmentFailure(f"{self._url} asks to be left alone for {_in_words(seconds)}. {_KEPT}")
        until = time.monotonic() + seconds
        if until > self._not_before and seconds >= TELL_FROM:
            self._log(f"{self._url} asks to be left alone for {_in_words(seconds)}: waiting")
        self._not_before = max(self._not_before, until)

    async def _wait_for_connection(self, problem: str) -> None:
        patience, now = self._settings.patience, time.monotonic()
        if self._unreachable_since is None:
            self._unreachable_since = now
            if patience > 0:
                self._log(f"{self._url}: {problem}; trying for {_in_words(patience)} to reach it")
        left = self._unreachable_since + patience - now
        if left <= 0:
            raise EnvironmentFailure(
                f"{self._url} could not be reached for {_in_words(patience)} (endpoint.patience): {problem}. "
                f"{_KEPT}"
            )
        await self._pause(min(BETWEEN_KNOCKS, left, patience / 10))

    async def _stopping(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except BaseException:
            self._stopped.set()
            raise

    async def _pause(self, seconds: float) -> None:
        """Wait; raises `_StoppedError` where another worker has ended in an error."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._stopped.wait()
        except TimeoutError:
            return
        raise _StoppedError


class _StoppedError(Exception):
    """This worker has nothing more to do."""


def _wants_other_limit(received: Received, sent: Mapping[str, Any]) -> bool:
    """Whether a model refuses `max_tokens` and says the newer name in its place."""
    return (
        received.status == 400
        and "max_tokens" in sent
        and "max_completion_tokens" in server_message(received.content)
    )


def _rename_limit(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"max_completion_tokens" if name == "max_tokens" else name: v for name, v in body.items()}


def _error_of(status: int) -> type[UserError | EnvironmentFailure]:
    return EnvironmentFailure if status in (402, 429) else UserError


def _in_words(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
