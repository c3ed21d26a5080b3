"""Two processes of one run, one of them killed or stopped at a random moment."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from cpu_times import crowding
from loopback import Forks, Processes, environment_of
from safetensors.numpy import load_file

from dpo.outcomes import PEER_LOST
from dpo.parallel import lost

PLACES = ("start", "reference", "step", "save", "evaluation", "export")
"""What the run is doing when a process is lost, by what it has written; a random time is waited on top."""
STEPS, SAVE_EVERY = 12, 4
PATIENT = [
    f"--distributed.{name}_timeout={seconds}"
    for name, seconds in (("start", 600), ("heartbeat", 300), ("step", 3600))
]
"""For runs that nothing happens to: a busy machine may be late, and no process is lost."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("lost")
    rows = [
        {"prompt": f"number {i}", "chosen": "yes, very good", "rejected": ["no", "perhaps"][i % 2]}
        for i in range(24)
    ]
    data = directory / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "model": {"source": str(tiny_model_dir), "attention": "plain"},  # the quickest to trace
        "data": {"train": str(data), "eval": str(data), "max_eval": 5, "max_length": 128},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "training": {
            "batch_size": 8,
            "steps": STEPS,
            "save_every": SAVE_EVERY,
            "eval_every": 6,
            "eval_samples": 2,
            "eval_max_new_tokens": 4,
        },
        "distributed": {"start_timeout": 30.0, "heartbeat_timeout": 10.0, "step_timeout": 60.0},
    }
    (directory / "settings.json").write_text(json.dumps(content))
    return directory


def config_of(directory: Path, name: str) -> Path:
    content = json.loads((directory / "settings.json").read_text()) | {"run_dir": str(directory / name)}
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def outcome_of_run(run_dir: Path) -> tuple[object, ...]:
    """Metrics but for their times, and the bytes of what was exported and of the held-out log-probs."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k not in ("seconds", "tokens/s")} for row in rows]
    export = (run_dir / "export" / "model.safetensors").read_bytes()
    heldout = load_file(run_dir / "heldout.safetensors")
    return kept, export, {name: values.tobytes() for name, values in heldout.items()}


@pytest.fixture(scope="module")
def forks(settings: Path) -> Iterator[Forks]:
    server = Forks(environment_of(1, settings))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(settings: Path, forks: Forks) -> tuple[object, ...]:
    """What a run comes to that nothing happened to."""
    codes, text = undisturbed(settings, forks, "whole")
    assert codes == [0, 0], text
    return outcome_of_run(settings / "whole")


def undisturbed(settings: Path, forks: Forks, name: str) -> tuple[list[int], str]:
    """Run two processes to their end; their codes, and what the first said."""
    config = config_of(settings, name)
    processes = Processes(2, 1, config, settings, extra=lambda _: PATIENT, start=forks)
    return processes.wait(3600), processes.text(0)


def lose_one(settings: Path, forks: Forks, number: int, how: signal.Signals) -> tuple[str, list[int], float]:
    """Start two processes and lose one; where, codes of the other and of itself, seconds of the other."""
    name, generator = f"{how.name}-{number}", random.Random(f"{how.name} {number}")
    processes = Processes(2, 1, config_of(settings, name), settings, start=forks)
    victim, place = generator.randrange(2), PLACES[number % len(PLACES)]
    try:
        wait_until(settings / name, place, processes)
        time.sleep(generator.uniform(0, 6.0 if place == "start" else 0.4))
        processes.all[victim].send_signal(how)
        start = time.monotonic()
        code = processes.all[1 - victim].wait(3600)
        seconds = time.monotonic() - start
        processes.all[victim].send_signal(signal.SIGCONT)  # it comes back when nobody waits for it any more
        return f"{place}, process {victim}", [code, processes.all[victim].wait(3600)], seconds
    finally:
        processes.end()
        for i in range(2):
            (settings / f"{name}-{i}.txt").write_text(processes.text(i))


def wait_until(run_dir: Path, place: str, processes: Processes) -> None:
    awaited = {
        "start": lambda: True,
        "reference": lambda: (run_dir / "config.yaml").exists(),
        "step": lambda: size(run_dir / "metrics.jsonl") > 0,
        "save": lambda: any((run_dir / "checkpoints").glob("*.writing")),
        "evaluation": lambda: (run_dir / "checkpoints" / str(SAVE_EVERY)).exists(),
        "export": lambda: (run_dir / "heldout.safetensors").exists(),
    }[place]
    deadline = time.monotonic() + 3600
    while not awaited() and time.monotonic() < deadline and all(p.poll() is None for p in processes.all):
        time.sleep(0.002)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_an_abort_after_a_long_silence_is_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the own coordination service still answers, and before or after the silence is noted."""
    now, ends, silence = [0.0], [], lost._Silence()
    monkeypatch.setattr(lost, "_SILENCE", silence)
    monkeypatch.setattr(lost, "_is_answered", lambda: True)
    monkeypatch.setattr(lost, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(lost, "os", SimpleNamespace(write=lambda *_: 0, _exit=ends.append))
    lost._answer_abort(signal.SIGABRT)
    silence.watch(5.0)
    for now[0], noted, expected in (
        (4.0, True, []),
        (10.0, False, [75]),
        (11.0, True, [75] * 2),
        (12.0, True, [75] * 3),
    ):
        if noted:
            silence.note()
        lost._answer_abort(signal.SIGABRT)
        assert ends == expected


NUM_KILLS, NUM_STOPS = 60, 10
OFTEN = range(12)
"""Kills that are tried with every change, twice in every place; the others when somebody asks."""
LOSSES = [
    *((signal.SIGKILL, number) for number in range(NUM_KILLS)),
    *((signal.SIGSTOP, number) for number in range(NUM_STOPS)),
]


def marks_of(how: signal.Signals, number: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow, *([pytest.mark.ci] if how is signal.SIGKILL and number in OFTEN else [])]


@pytest.mark.parametrize(
    ("how", "number"),
    [pytest.param(*loss, id=f"{loss[0].name}-{loss[1]}", marks=marks_of(*loss)) for loss in LOSSES],
)
def test_a_lost_process_costs_nothing_but_time(how, number, settings, forks, whole, capsys):
    """The other ends within a minute by a code that launchers go on from; started again, the same bits."""
    place, codes, seconds = lose_one(settings, forks, number, how)
    with capsys.disabled():
        print(f"{how.name}-{number} ({place}): {codes}, the other after {seconds:.1f} s", flush=True)
    name = f"{how.name}-{number}"
    assert codes[0] in (0, PEER_LOST.code), said(settings, name)
    assert codes[1] in ((-how,) if how is signal.SIGKILL else ()) + (0, PEER_LOST.code), said(settings, name)
    assert seconds < 60 * crowding(), said(settings, name)
    again, text = undisturbed(settings, forks, name)
    assert again == [0, 0], text
    assert outcome_of_run(settings / name) == whole, name


def said(settings: Path, name: str) -> str:
    return "\n----\n".join((settings / f"{name}-{i}.txt").read_text() for i in range(2))
