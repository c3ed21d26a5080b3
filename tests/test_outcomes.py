"""Every cause of an end: its code, its message, and the table about it in docs/reliability.md."""

from __future__ import annotations

import errno
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from dpo import outcomes
from dpo.__main__ import LONG
from dpo.cli import COMMANDS, command_parser, main
from dpo.config import (
    Config,
    DistributedConfig,
    EvaluateConfig,
    FrontierConfig,
    GenerateConfig,
    WinrateConfig,
)
from dpo.files import WriteError
from dpo.outcomes import OUTCOMES, Outcome, UserError, describe, failure_of, outcome_of
from dpo.parallel import joining

ROOT = Path(__file__).resolve().parents[1]


class JaxRuntimeError(RuntimeError):
    """Named as JAX's."""


class BarrierTimeoutException(Exception):  # noqa: N818
    """Named as Orbax's, and as its of no other class."""


GLOO = "UNKNOWN: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"


def caused(error: BaseException, cause: BaseException) -> BaseException:
    """An error that was raised from another."""
    error.__cause__ = cause
    return error


CASES: list[tuple[BaseException, Outcome]] = [
    (UserError("beta is -1"), outcomes.USER),
    (ValueError(GLOO), outcomes.PEER_LOST),
    (JaxRuntimeError(GLOO), outcomes.PEER_LOST),
    (OSError(GLOO), outcomes.PEER_LOST),
    (BarrierTimeoutException("DEADLINE_EXCEEDED: Barrier of the coordination service"), outcomes.PEER_LOST),
    (TimeoutError("timed out"), outcomes.ENVIRONMENT),
    (JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce() failed: ncclRemoteError"), outcomes.PEER_LOST),
    (JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses"), outcomes.PEER_LOST),
    (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), outcomes.OUT_OF_MEMORY),
    (ValueError("RESOURCE_EXHAUSTED: No space left [os_error_code='28']"), outcomes.ENVIRONMENT),
    (MemoryError(), outcomes.OUT_OF_MEMORY),
    (JaxRuntimeError("INTERNAL: the compiler met something"), outcomes.BUG),
    (WriteError("the summary could not be written"), outcomes.ENVIRONMENT),
    (OSError(errno.ENOSPC, "No space left on device"), outcomes.ENVIRONMENT),
    (ConnectionRefusedError(), outcomes.ENVIRONMENT),
    (httpx2.ConnectError("All connection attempts failed"), outcomes.ENVIRONMENT),
    (caused(UserError("could not be fetched"), socket.gaierror(-3, "no name")), outcomes.ENVIRONMENT),
    (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), outcomes.ENVIRONMENT),
    (caused(UserError("a.jsonl: cannot be read"), OSError(errno.EIO, "I/O error")), outcomes.ENVIRONMENT),
    (caused(UserError("4 can't be restored"), ValueError("os_error_code='116'")), outcomes.ENVIRONMENT),
    (caused(UserError("no such file"), FileNotFoundError(errno.ENOENT, "No such file")), outcomes.USER),
    (KeyError("weight"), outcomes.BUG),
    (ValueError("invalid literal"), outcomes.BUG),
    (KeyboardInterrupt(), outcomes.STOPPED_AT_ONCE),
    (outcomes.StopRequested("as asked"), outcomes.STOPPED),
    (outcomes.NoProgressError("ten starts"), outcomes.NO_PROGRESS),
]
IDS = [f"{type(error).__name__} {str(error)[:20]}" for error, _ in CASES]


@pytest.mark.parametrize(("error", "outcome"), CASES, ids=IDS)
def test_an_error_is_sorted_by_its_cause(error: BaseException, outcome: Outcome) -> None:
    assert outcome_of(error) is outcome
    outer = RuntimeError("in between")
    outer.__cause__ = error
    assert outcome_of(outer) is outcome


@pytest.mark.parametrize(("error", "outcome"), CASES, ids=IDS)
def test_one_process_ends_by_it(
    error: BaseException,
    outcome: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "train", fail)
    if outcome is outcomes.BUG:  # keeps its traceback; Python's own exit code is 1
        with pytest.raises(type(error)):
            main(["train"])
        return
    assert main(["train"]) == outcome.code
    assert capsys.readouterr().err.startswith(f"dpo train: {outcome.begins}: ")


@pytest.mark.parametrize(("error", "outcome"), CASES, ids=IDS)
def test_one_of_several_processes_ends_by_it_and_the_others_hear_it(
    error: BaseException, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    said: list[tuple[Outcome, str]] = []
    monkeypatch.setattr(joining, "find_cluster", lambda *_: joining.Cluster("here:1", 2, 0, "settings"))
    monkeypatch.setattr(joining, "_meet", lambda *_: None)
    monkeypatch.setattr(joining, "heard_failure", lambda: None)
    monkeypatch.setattr(joining, "say_outcome", lambda *words: said.append(words))
    monkeypatch.setattr(joining.atexit, "register", lambda _, code, **kwargs: ends.append(code))
    given = DistributedConfig()
    with pytest.raises(BaseException) as caught, joining.joined(given):  # noqa: PT011
        raise error
    assert ends == [outcome.code]
    assert outcome_of(caught.value) is outcome
    assert said[0][0] is outcome
    assert outcome_of(failure_of(*said[0])) is outcome, "what the others raise"


def test_missing_memory_names_what_helps() -> None:
    text = describe("dpo train", MemoryError())
    assert all(name in text for name in ("memory_limit", "micro_batches", "remat"))
    assert describe("dpo export", MemoryError()).endswith("allowed is what fits, or a machine with more")


@pytest.mark.parametrize("command", outcomes.MEMORY_ADVICE)
def test_what_helps_where_memory_is_missing_is_a_setting_of_the_command(command: str) -> None:
    advice = describe(command, MemoryError()).rpartition("; ")[2]
    named = re.findall(r"--([a-z_]+)", advice) or re.findall(r"\b[a-z]+\.[a-z_]+", advice)
    kinds = {"evaluate": EvaluateConfig, "winrate": WinrateConfig, "generate": GenerateConfig}
    kind = kinds.get(command.split()[1], FrontierConfig if command == "dpo frontier" else Config)
    assert named
    assert set(named) <= set(command_parser(command.split()[1], kind).setting_names())


def test_the_table_of_the_page_is_this_one() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| `([^`|]*)` \| (yes|no) \|", page, re.MULTILINE)
    assert rows == [
        (outcome.cause, str(outcome.code), outcome.begins, "yes" if outcome.goes_on else "no")
        for outcome in OUTCOMES.values()
        if outcome is not outcomes.FINISHED
    ]


def test_the_table_of_several_processes_has_the_same_codes() -> None:
    """Whoever says its cause takes the others along with its code; who says nothing is lost to them."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (\d*) ?\| (\d+) \| (yes|no) \|", page, re.MULTILINE)
    known = [(OUTCOMES[cause], own, others, on) for cause, own, others, on in rows if cause in OUTCOMES]
    for outcome, own, others, goes_on in known:
        silent = outcome is outcomes.STOPPED_AT_ONCE
        assert own == str(outcome.code)
        assert others == str(outcomes.PEER_LOST.code if silent else outcome.code)
        assert goes_on == ("yes" if outcome.goes_on else "no")
    told = {outcomes.FINISHED, outcomes.NO_PROGRESS, outcomes.PEER_LOST}  # which are of all at once
    assert {outcome for outcome, *_ in known} == set(OUTCOMES.values()) - told
    assert [row for row in rows if row[0] not in OUTCOMES] == [
        ("killed", "137", "75", "yes"),
        ("silent", "", "75", "yes"),
        ("not there", "", "75", "yes"),
    ]


def test_a_stop_that_is_answered_is_said_in_the_words_of_the_page() -> None:
    words = "stopped as asked; the same command goes on from there"
    assert f"`RUN: {words}`" in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert words.startswith(outcomes.STOPPED.begins)
    for name in ("train", "sweep", "experiments"):
        text = (ROOT / "dpo" / "commands" / f"{name}.py").read_text(encoding="utf-8")
        assert f"}}: {words}" in text, name


ANSWERS = {
    "plan": ("dpo.commands.plan.plan_step", False, "with {} where a step does not fit"),
    "sweep": ("dpo.commands.sweep.sweep_over", False, "with {} where one of its runs failed"),
    "watch": ("dpo.commands.report.watch_run", False, "with {} where the run is not finished"),
}
"""What a command calls, what that may give, and what the page says of the code."""


@pytest.mark.parametrize("name", ANSWERS)
def test_codes_that_answer_are_those_of_the_page(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called, given, said = ANSWERS[name]
    arguments = {"plan": [], "sweep": ["--over=objective.beta=[0.1]"], "watch": ["RUN"]}[name]
    monkeypatch.setattr(called, lambda *_, **__: given)
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert f"`dpo {name}` {said.format(main([name, *arguments]))}" in page
    monkeypatch.setattr(called, lambda *_, **__: True)
    assert main([name, *arguments]) == 0


SIGNALLED = """
import os, signal, sys
from dpo import __main__ as main, cli
number = signal.Signals[sys.argv[1]]
before = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
for name in cli.COMMANDS:
    signal.signal(number, before)  # also under nohup, or in the background
    cli.COMMANDS[name] = lambda rest: (os.kill(os.getpid(), number), signal.pause())[0]
    sys.argv = ["dpo", name]
    print(name, main.answer_signals() if name in main.LONG else main.end_at_once(), flush=True)
    assert signal.getsignal(number) is before
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_every_command_by_what_the_table_says(name: str) -> None:
    """As stopped where another start goes on from what is kept, at once where it begins anew."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ends = {
        command: outcomes.STOPPED if command in LONG else outcomes.STOPPED_AT_ONCE for command in COMMANDS
    }
    assert done.stdout.splitlines() == [f"{command} {end.code}" for command, end in ends.items()]
    said = "by Ctrl-C" if name == "SIGINT" else f"by {name}"
    for line, (command, end) in zip(done.stderr.splitlines(), ends.items(), strict=True):
        assert line.startswith(f"dpo {command}: {end.begins}: {'' if end is outcomes.STOPPED else said}")
