"""Runs of a tiny model, each forked from this process, which has imported everything: a start costs little.

One JSON object a line comes in on standard input:

    config    a run's config.yaml, or a list of them to run one after the other
    command   a command line in place of the runs, as `dpo` takes it
    log       file for what the runs print
    hooks     list of {"where", "count", "do"}: at the count-th (from 1) of what `PLACES` names, do
              "SIGTERM", "hang" (until a signal ends it), "lock" (nobody may write checkpoints any more),
              "fill" (a file beside the run takes the rest of its disk), "limit" (as `ulimit -f 0`: no file
              may grow), "remove" or "rename" (the run directory)
    obey      true: give up root's right to write where permissions forbid it
    measure   file for memory, threads, open files and compilations, at some steps and after each run
    clock     "jumps": let the wall clock go back and forth

Out come the number of the process that runs it and, when it has ended, how: "pid 123", "exit 75" (negative:
by that signal).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig  # noqa: F401 (transformers loads late what is not named)

from dpo import __main__
from dpo.command_line import load_config
from dpo.evaluation import heldout
from dpo.judging import match, samples
from dpo.outcomes import describe, outcome_of
from dpo.pages import report
from dpo.training import export, loop, on_policy, program
from dpo.training.checkpoint import Checkpoints
from dpo.training.reference import fingerprint_parameters
from dpo.training.validation import Validation

EXIT_CODES = {"finished": 0, "already finished": 0, "interrupted": 75}


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever began the tests may have it ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run(command))
        print(f"pid {pid}", flush=True)
        _, status, used = os.wait4(pid, 0)
        print(f"{command['log']}: {used.ru_utime + used.ru_stime:.1f} CPU seconds", file=sys.stderr)
        print(f"exit {os.waitstatus_to_exitcode(status)}", flush=True)


def run(command: dict) -> int:
    """In the child: the runs of one command; the last one's exit code."""
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if command.get("obey"):
        obey_permissions()
    if command.get("clock") == "jumps":
        jumps = itertools.cycle([0.0, 86_400.0, -86_400.0])
        now = time.time
        time.time = lambda: now() + next(jumps)
    measure = Measure(command["measure"]) if command.get("measure") else None
    hooks = list(command.get("hooks", []))
    paths = command["config"] if isinstance(command["config"], list) else [command["config"]]
    code = 1
    try:
        if command.get("command"):
            put_hooks(hooks, Path(load_config(paths[0]).run_dir), measure)
            return dpo(command["command"])
        for path in paths:
            config = load_config(path)
            put_hooks(hooks, Path(config.run_dir), measure)
            result = loop.train(config)
            code = EXIT_CODES[result.status]
            if measure is not None:
                measure.take(f"after {config.run_dir}")
            if code == 0:
                write_digest(Path(config.run_dir))
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with open(command["log"], "a") as said:
            traceback.print_exc(file=said)
            print(describe("dpo train", error), file=said)
        code = outcome_of(error).code
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def dpo(arguments: list[str]) -> int:
    """What `dpo/__main__.py` does, but for starting anew."""
    sys.argv = ["dpo", *arguments]
    code = __main__.answer_signals() if arguments[0] in __main__.LONG else __main__.end_at_once()
    if code == 0 and arguments[0] == "train":
        write_digest(Path(load_config(arguments[2]).run_dir))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


PLACES = {
    "scoring": (loop, "score_datasets"),
    "evaluation": (Validation, "evaluate"),
    "sampling": (on_policy, "generate"),
    "save": (Checkpoints, "save"),
    "export": (export, "save_pretrained"),
    "figures": (heldout, "load_heldout"),
    "held-out scoring": (heldout, "_score_policy"),
    "report": (report, "write_report"),
    "answers": (samples, "generate"),
    "verdicts": (match, "_judged"),
}
"""Where something may happen: the function that is called there. A step is what `make_train_step` makes."""


def obey_permissions() -> None:
    """Drop the capabilities CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, whoever this is."""
    version_3 = 0x20080522
    header, data = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0, os.strerror(ctypes.get_errno())
    data[0] &= ~0b110  # effective; permitted and inheritable follow
    data[1] &= ~0b110
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


def fill(path: Path) -> None:
    """Write until the disk is full; once every name is whole that is being written."""
    while any(path.parent.rglob("*.writing")):
        time.sleep(0.01)
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass


def take_away(run_dir: Path, *, keep: bool) -> None:
    """The run directory gets another name in the same instant, and goes where it is not to be kept."""
    elsewhere = run_dir.rename(run_dir.with_name("elsewhere"))
    if not keep:
        shutil.rmtree(elsewhere)


def put_hooks(hooks: list[dict], run_dir: Path, measure: Measure | None) -> None:
    """Wrap what a run calls, so that things happen at an exact place."""
    counts: dict[str, int] = dict.fromkeys(("step", *PLACES), 0)

    def reach(where: str) -> None:
        counts[where] += 1
        if where == "step" and measure is not None and counts[where] % measure.every == 0:
            measure.take(counts[where])
        for hook in hooks:
            if (hook["where"], hook["count"]) == (where, counts[where]):
                if hook["do"] == "hang":
                    (run_dir / "hanging").touch()
                    time.sleep(600)
                elif hook["do"] == "lock":
                    while any((run_dir / "checkpoints").glob("*.writing")):  # the save before
                        time.sleep(0.01)
                    (run_dir / "checkpoints").chmod(0o500)
                elif hook["do"] == "limit":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
                elif hook["do"] in ("remove", "rename"):
                    take_away(run_dir, keep=hook["do"] == "rename")
                elif hook["do"] == "fill":
                    fill(run_dir.parent / "filler")
                else:
                    os.kill(os.getpid(), signal.Signals[hook["do"]])

    def wrapped(function, where):
        def call(*args, **kwargs):
            reach(where)
            return function(*args, **kwargs)

        return call

    make: Any = original(program, "make_train_step")
    program.make_train_step = lambda *args, **kwargs: wrapped(make(*args, **kwargs), "step")
    for where, (owner, name) in PLACES.items():
        setattr(owner, name, wrapped(original(owner, name), where))


ORIGINALS: dict[tuple[int, str], object] = {}


def original(owner, name):
    """What was there before the first hook."""
    return ORIGINALS.setdefault((id(owner), name), getattr(owner, name))


def write_digest(run_dir: Path) -> None:
    """SHA-256 of the newest checkpoint's parameters, optimiser state and step, as RUN/digest."""
    import orbax.checkpoint as ocp

    with Checkpoints(run_dir / "checkpoints", keep=1, read_only=True) as checkpoints:
        state = ocp.StandardCheckpointer().restore(checkpoints.path(checkpoints.latest or 0) / "state")
    (run_dir / "digest").write_text(fingerprint_parameters(state))


class Measure:
    """Resident memory, threads, open files and compilations, one JSON line each time."""

    every = 100

    def __init__(self, path: str):
        import jax

        self._path = Path(path)
        self._compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._compilations += event.endswith("backend_compile_duration")

    def take(self, when: int | str) -> None:
        """Append what is in use now."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        now = {
            "when": when,
            "memory": pages * os.sysconf("SC_PAGE_SIZE"),
            "threads": len(os.listdir("/proc/self/task")),
            "python_threads": threading.active_count(),
            "files": len(os.listdir("/proc/self/fd")),
            "compilations": self._compilations,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(now) + "\n")


if __name__ == "__main__":
    main()
