"""A coroutine's results in a plain loop: it runs in a thread of its own, and is cancelled when the loop ends.

So it works beside a running event loop (a notebook's), and a Ctrl-C in the loop ends it at once.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")
_PATIENCE = 5.0
"""Seconds that a cancelled coroutine has to end."""


_LOOK_UP = 0.2
"""Seconds between two looks for a signal that another thread was given."""


class _End(NamedTuple):
    error: BaseException | None


def in_background(work: Callable[[Callable[[Item], None]], Coroutine[Any, Any, None]]) -> Iterator[Item]:
    """What `work(give)` gives, as soon as it gives it; then its error, if it ends in one."""
    given: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()

    async def run() -> None:
        task = asyncio.ensure_future(work(given.put))
        started.set_result((asyncio.get_running_loop(), task))
        await task

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            given.put(_End(error))
        else:
            given.put(_End(None))

    thread = threading.Thread(target=main, name="background", daemon=True)
    thread.start()
    try:
        while not isinstance(item := _next(given), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        loop, task = started.result()
        if thread.is_alive() and not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)
        thread.join(_PATIENCE)


def _next(given: queue.SimpleQueue[Item | _End]) -> Item | _End:
    while True:
        with suppress(queue.Empty):
            return given.get(timeout=_LOOK_UP)
