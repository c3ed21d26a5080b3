"""The grid of a sweep, its processes, and a sweep from the command line."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from dpo.cli import main
from dpo.experiments import sweep
from dpo.experiments.sweep import Trial, end_at_once, make_trials, run_trials


def test_every_combination_is_a_run_named_by_what_differs(tmp_path):
    trials = make_trials(["objective.beta=[0.05,0.1]", "optimizer.learning_rate=[1e-5]"], tmp_path)
    assert [trial.name for trial in trials] == [
        "beta=0.05,learning_rate=1e-5",
        "beta=0.1,learning_rate=1e-5",
    ]
    run_dir = tmp_path / "beta=0.05,learning_rate=1e-5"
    assert trials[0].arguments == (
        "--objective.beta=0.05",
        "--optimizer.learning_rate=1e-5",
        f"--run_dir={run_dir}",
    )


def test_names_that_end_alike_are_whole_and_directories_are_harmless(tmp_path):
    (trial,) = make_trials(["data.split=[a/../b]", "model.split=[null]"], tmp_path)
    assert trial.name == "data.split=a/../b,model.split=null"
    assert trial.run_dir.parent == tmp_path


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (["objective.beta"], "allowed is NAME="),
        (["objective.beta=0.1"], "allowed is NAME="),
        (["objective.beta=[]"], "allowed is NAME="),
        (["objective.beta=[0.1"], "no YAML"),
        (["objective.beta=[0.1,0.1]"], "a value comes twice"),
        (["a=[1]", "a=[2]"], "twice; allowed is one list a setting"),
        (["run_dir=[a]"], "every run has its own"),
        (["model.source=[a/b,a:b]"], "one directory"),
    ],
)
def test_what_is_no_list_of_values_is_refused(tmp_path, over, said):
    with pytest.raises(ValueError, match=said):
        make_trials(over, tmp_path)


def as_program(monkeypatch, text: str) -> None:
    """`dpo train` is a short program here, which has the trial's name as its last argument."""
    popen = sweep.subprocess.Popen
    monkeypatch.setattr(
        sweep.subprocess,
        "Popen",
        lambda command, **how: popen([sys.executable, "-c", text, *command[5:]], **how),
    )


def trial(name: str) -> Trial:
    return Trial(name, Path(name), (name,))


def test_a_run_that_fails_does_not_end_the_sweep(monkeypatch):
    as_program(monkeypatch, "import sys; sys.exit(3 if sys.argv[-1] == 'bad' else 0)")
    said: list[str] = []
    codes = run_trials([trial("bad"), trial("good")], ["x"], lambda: False, log=said.append, running=[])
    assert codes == {"bad": 3, "good": 0}
    assert said == ["sweep 1/2: bad", "sweep 2/2: good"]


def test_a_stop_is_passed_on_and_ends_the_sweep(monkeypatch, tmp_path):
    ready = tmp_path / "ready"
    as_program(
        monkeypatch,
        f"import pathlib, signal, sys, time; signal.signal({int(signal.SIGTERM)}, lambda *_: sys.exit(75)); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)",
    )
    started = time.monotonic()
    codes = run_trials([trial("one"), trial("two")], [], ready.exists, log=lambda _: None, running=[])
    assert codes == {"one": 75}
    assert time.monotonic() - started < 30


def test_a_run_is_ended_at_once_with_what_it_has_started(monkeypatch, tmp_path):
    """As by a second signal: a run that does not answer is not left behind, nor are its own processes."""
    pids = tmp_path / "pids"
    as_program(
        monkeypatch,
        "import os, signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "other = subprocess.Popen(['sleep', '600']); "
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{other.pid}}\\n'); time.sleep(600)",
    )

    def end() -> bool:
        if pids.is_file() and pids.read_text().endswith("\n"):
            end_at_once(running)
        return False

    running: list[sweep.Process] = []
    assert run_trials([trial("one")], [], end, log=lambda _: None, running=running) == {"one": -9}
    assert running == []
    deadline = time.monotonic() + 10
    while any(is_running(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """A process that has ended may wait for somebody to ask for its code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_settings_of_any_run_are_refused_before_the_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "run_trials", lambda *_, **__: pytest.fail("a run was started"))
    given = ["sweep", "--config=sentiment_pairs", f"--sweep_dir={tmp_path}"]
    assert main([*given, "--over", "objective.beta=[0.1,-1]"]) == 2
    assert "beta is -1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*given, "--over", "objective.betta=[0.1]", "--over=training.stepz=[1]"])
    assert ended.value.code == 2
    assert main([*given, "--data.eval=null", "--over", "objective.beta=[0.1]"]) == 2
    assert "a sweep chooses by held-out preferences" in capsys.readouterr().err


def test_a_run_that_was_not_asked_to_stop_is_not_said_to_be(tmp_path, capsys, monkeypatch):
    """A hang, say, in the last run, after which nothing is left over; it had no part in the choice before."""
    monkeypatch.setattr(sweep, "run_trials", lambda trials, *_, **__: {trials[0].name: 0, trials[1].name: 75})
    given = ["sweep", "--config=sentiment_pairs", f"--sweep_dir={tmp_path}"]
    assert main([*given, "--over", "objective.beta=[0.1,0.2]"]) == 75
    said = f"{tmp_path}: beta=0.2 ended with exit code 75; the same command goes on from there\n"
    assert capsys.readouterr().out.endswith(said)


@pytest.mark.slow
def test_two_runs_are_trained_compared_and_gone_on_with(tiny_model_dir, tmp_path, capfd):
    """Two processes of the real command on a tiny model (CI: `tests/test_first_week.py`)."""
    for name, count in (("train", 8), ("eval", 12)):
        rows = [{"prompt": f"{name} {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        "sweep",
        f"--model.source={tiny_model_dir}",
        f"--data.train={tmp_path / 'train.jsonl'}",
        f"--data.eval={tmp_path / 'eval.jsonl'}",
        f"--model.reference_store={tmp_path / 'reference'}",
        "--training.steps=2",
        "--training.batch_size=4",
        f"--sweep-dir={tmp_path / 'sweep'}",
        "--over=optimizer.learning_rate=[1e-2,1e-9]",
    ]
    assert main(given) == 0
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert {run["name"] for run in result["runs"]} == {"learning_rate=1e-2", "learning_rate=1e-9"}
    assert result["prompts"] == {"choosing": 6, "stated": 6}
    assert result["failed"] == {}
    page = (tmp_path / "sweep" / "comparison.html").read_text()
    assert "learning_rate" in page
    assert f"chosen: {result['chosen']}, by 6 of the held-out prompts" in page
    printed = capfd.readouterr().out
    assert f"chosen: {result['chosen']}" in printed
    assert main(given) == 0
    assert "is finished: nothing to do" in capfd.readouterr().out
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == result
