"""Several runs that differ in some settings, one after the other, and the choice among them.

Every run is a command of its own, `dpo train`, in a process of its own: what one leaves in memory, or dies
of, is none of the next one's business. They share what is stored beside runs: tokens, the reference's
log-probs and compiled programs. The same sweep goes on where it was stopped, and may go on at several hosts
that share its directory: a run that another process holds is passed by.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo.distribution import own_python
from dpo.evaluation.choosing import Choice
from dpo.outcomes import STOPPED, UserError

RESULT_FILE = "sweep.json"
_FORBIDDEN = ("run_dir",)


Process = subprocess.Popen[bytes]


class Trial(NamedTuple):
    """One run of a sweep."""

    name: str
    run_dir: Path
    arguments: tuple[str, ...]
    """What its command line has besides the sweep's own."""


def make_trials(over: Sequence[str], directory: Path) -> list[Trial]:
    """A run for each combination of values; `over` has "NAME=[VALUE, …]" once for each setting.

    Raises:
      UserError: for anything else, a setting that comes twice, and values that come twice.
    """
    settings = [_read_over(text) for text in over]
    names = [name for name, _ in settings]
    if len(set(names)) < len(names):
        raise UserError(f"--over names {max(names, key=names.count)} twice; allowed is one list a setting")
    short = _short_names(names)
    found = []
    for values in product(*(values for _, values in settings)):
        label = ",".join(f"{short[name]}={value}" for name, value in zip(names, values, strict=True))
        place = re.sub(r"[^\w.,=+-]", "_", label)[:150]
        arguments = tuple(f"--{name}={value}" for name, value in zip(names, values, strict=True))
        found.append(Trial(label, directory / place, (*arguments, f"--run_dir={directory / place}")))
    if len({trial.run_dir for trial in found}) < len(found):
        raise UserError(
            "two combinations of --over have one directory; allowed are values whose texts differ"
        )
    return found


def _read_over(text: str) -> tuple[str, list[str]]:
    """The setting and the texts of its values."""
    name, equals, given = text.partition("=")
    try:
        values = yaml.safe_load(given)
    except yaml.YAMLError as error:
        raise UserError(f"--over {text}: its values are no YAML: {error}") from error
    if (
        not equals
        or not re.fullmatch(r"[a-z]\w*(\.\w+)*", name)
        or not isinstance(values, list)
        or not values
    ):
        raise UserError(f"--over {text!r}: allowed is NAME=[VALUE, ...], such as objective.beta=[0.05,0.1]")
    if name in _FORBIDDEN:
        raise UserError(f"--over {name}: every run has its own; --sweep_dir says where they are")
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    if len(set(texts)) < len(texts):
        raise UserError(f"--over {text}: a value comes twice; allowed is once")
    return name, texts


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """The last parts of dotted names, where these tell them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: end if last.count(end) == 1 else name for name, end in zip(names, last, strict=True)}


def run_trials(
    trials: Sequence[Trial],
    arguments: Sequence[str],
    stop_requested: Callable[[], bool],
    *,
    log: Callable[[str], None],
    running: list[Process],
) -> dict[str, int]:
    """Exit codes of the runs by name, in order; a request to stop ends with the run that it stopped.

    `running` has the process of the run that goes on at the moment, for whoever has to end it at once.
    """
    codes: dict[str, int] = {}
    for number, trial in enumerate(trials, start=1):
        log(f"sweep {number}/{len(trials)}: {trial.name}")
        command = ["-m", "dpo", "train", *arguments, *trial.arguments]
        codes[trial.name] = _run(command, stop_requested, running)
        if codes[trial.name] == STOPPED.code or stop_requested():
            break
    return codes


def _run(arguments: Sequence[str], stop_requested: Callable[[], bool], running: list[Process]) -> int:
    """The exit code of a Python with these arguments, to which a request to stop is passed on."""
    with _started(arguments, running) as process:
        asked = False
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop_requested() and not asked:
                    asked = True
                    process.terminate()


@contextmanager
def _started(arguments: Sequence[str], running: list[Process]) -> Iterator[Process]:
    """A process of its own group, which gets no signal but ours, and does not outlive this."""
    python, environment = own_python()
    process = subprocess.Popen([*python, *arguments], env=environment, process_group=0)
    running.append(process)
    try:
        yield process
    finally:
        end_at_once(running)
        process.wait()
        running.remove(process)


def end_at_once(running: Sequence[Process]) -> None:
    """Kill these processes and what they have started; what they had saved whole stays."""
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the leader of its group


def as_result(choice: Choice, places: Mapping[str, Path], codes: Mapping[str, int]) -> dict[str, Any]:
    """What `sweep.json` holds: the runs in the order of the choice, and those that came to nothing."""
    return {
        "chosen": choice.chosen.name,
        "prompts": {"choosing": choice.prompts[0], "stated": choice.prompts[1]},
        "not_told_apart": choice.not_told_apart,
        "runs": [
            {
                "name": one.name,
                "run": str(places[one.name]),
                "accuracy_choosing": list(one.choosing),
                "accuracy_stated": list(one.stated),
                "behind_the_chosen": None if one.behind is None else list(one.behind),
            }
            for one in choice.judged
        ],
        "failed": {name: code for name, code in codes.items() if code},
    }


def choice_as_text(choice: Choice) -> str:
    """The table, and what may be said of the chosen run."""
    width = max(len(one.name) for one in choice.judged)
    lines = [f"{'':<{width}}  accuracy by which is chosen   accuracy on the other half"]
    for one in choice.judged:
        lines.append(f"{one.name:<{width}}  {one.choosing!s:<28}  {one.stated}")
    return "\n".join([*lines, *choice.in_words()])
