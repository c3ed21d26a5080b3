"""What the processes of one run do together: share, gather, compare, vote.

The engine is JAX's distributed runtime. Every process runs the same program on the same global arrays; what
differs is who writes (the main process) and which rows and parameters a process places (its devices').
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo.outcomes import OUTCOMES, UserError, failure_of, outcome_of, text_of

_EXCHANGE_BYTES = 1 << 26
"""What `from_all` puts on a device at a time."""


def is_main() -> bool:
    """Whether this process writes logs, metrics and exports."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether there is no other process in the run."""
    return jax.process_count() == 1


def from_main(arrays: Any) -> Any:
    """The main process's arrays on every process; all give arrays of the same shapes."""
    return arrays if is_alone() else multihost_utils.broadcast_one_to_all(arrays)


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` gives in the main process, which alone calls it, on every process; plain JSON.

    Raises:
      what it raised there; on the others an error of the same cause, with its text.
      TypeError: where it gives what JSON does not hold (a path, an array, keys that are no texts).
    """
    if is_alone():
        return function()
    answer, failure = b"", None
    if is_main():
        try:
            answer = json.dumps({"value": _checked_json(function())}).encode()
        except (Exception, KeyboardInterrupt) as error:
            answer, failure = _as_bytes(error), error
    size = int(from_main(np.asarray(len(answer))))
    mine = np.frombuffer(answer or bytes(size), np.uint8)
    shared = json.loads(from_main(mine).tobytes())
    if failure is not None:
        raise failure
    if "cause" in shared:
        raise _from_json(shared, process=0)
    return shared["value"]


def _checked_json(value: Any) -> Any:
    """The same value, which JSON gives back but for tuples as lists; `json` makes texts of other keys."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is no text, and passes from process to process as JSON")
            _checked_json(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _checked_json(one)
    return value


def _as_bytes(error: BaseException) -> bytes:
    return json.dumps({"cause": outcome_of(error).cause, "error": text_of(error)}).encode()


def _from_json(shared: Mapping[str, str], *, process: int) -> BaseException:
    return failure_of(OUTCOMES[shared["cause"]], f"process {process} stopped: {shared['error']}")


def from_all(function: Callable[[], bytes]) -> list[bytes]:
    """What `function` gives in each process, in their order, on all of them.

    Raises:
      on all of them an error of the cause of what it raised in the first where it did, with its text.
    """
    if is_alone():
        return [function()]
    failure = None
    try:
        mine = function()
    except (Exception, KeyboardInterrupt) as error:
        mine, failure = _as_bytes(error), error
    header = np.asarray([len(mine), failure is not None], np.int64)
    headers = _gather(header.view(np.uint32)).view(np.int64)
    block = _EXCHANGE_BYTES // len(headers)
    received = [bytearray() for _ in headers]
    for start in range(0, int(headers[:, 0].max()), block):
        sent = np.frombuffer(mine[start : start + block], np.uint8)
        size = min(block, int(headers[:, 0].max()) - start)
        for whole, piece, length in zip(received, _gather(np.resize(sent, size)), headers[:, 0], strict=True):
            whole += piece[: max(0, length - start)].tobytes()
    for process, (_, failed) in enumerate(headers):
        if failed:
            raise _from_json(json.loads(received[process]), process=process) from failure
    return [bytes(whole) for whole in received]


def _gather(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, which are alike in shape, one after the other."""
    return np.asarray(multihost_utils.process_allgather(array))


def fetch(array: Any) -> np.ndarray:
    """An array on this host, whole; all processes call this together."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def on_this_host(tree: Any) -> Any:
    """A tree whose arrays this host has whole; all processes call this together."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else jnp.asarray(fetch(x)), tree)


def agree(facts: Mapping[str, Any]) -> None:
    """Compare what all processes must have in common before they compute together.

    One may have facts that another has not, such as the settings of another objective: these differ too.

    Raises:
      ValueError: on every process, naming the facts that differ and the processes that differ from the main.
    """
    if is_alone():
        return
    mine = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
    first, *others = (json.loads(theirs) for theirs in from_all(lambda: json.dumps(mine).encode()))
    differs = {
        name: [str(i) for i, theirs in enumerate(others, 1) if theirs.get(name) != first.get(name)]
        for name in dict.fromkeys(name for theirs in (first, *others) for name in theirs)
    }
    what = "; ".join(f"{name} of process {', '.join(found)}" for name, found in differs.items() if found)
    if what:
        raise UserError(
            f"the processes of this run do not agree: {what} differs from process 0's; allowed is the same "
            "version, settings, weights, data and run directory everywhere"
        )


def shared_vote(requested: Callable[[], bool], mesh: Mesh) -> Callable[[], bool]:
    """Whether any process was asked to stop, with the same answer on all of them.

    Of several processes, each call sends this one's answer and returns the outcome of the call before: the
    vote is computed on the devices, between steps, and no step waits for it.
    """
    if is_alone():
        return requested
    everyone = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    any_of = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    outcome: list[jax.Array] = []

    def vote() -> bool:
        mine = np.full(mesh.size, requested(), np.int32)
        votes = jax.make_array_from_callback(mine.shape, everyone, lambda index: mine[index])
        outcome.append(any_of(votes))
        return len(outcome) > 1 and bool(outcome.pop(0))

    return vote
