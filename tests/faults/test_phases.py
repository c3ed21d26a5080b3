"""A signal in every phase of `dpo train` and of what follows it: each start ends by it, the next goes on.

(One in the export lets it finish: `test_resume.py`.)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import outcome

from dpo.outcomes import STOPPED, STOPPED_AT_ONCE
from dpo.training.interrupt import SIGNALS

TRAIN = ("train", "--config", "CONFIG", "--winrate=longer")
PHASES = [
    ("scoring", 1),
    ("evaluation", 1),
    ("sampling", 2),
    ("save", 2),
    ("figures", 1),
    ("report", 1),
    ("answers", 2),
    ("verdicts", 3),
]


@pytest.fixture(scope="module")
def undisturbed(server, make_config, tmp_path_factory):
    config = sampled(make_config, tmp_path_factory.mktemp("undisturbed") / "run")
    assert server.command(config, *TRAIN) == 0, server.printed(config)
    return config


def sampled(make_config, run_dir: Path):
    return make_config(run_dir, eval_samples=2, eval_max_new_tokens=4)


def left_by(config) -> dict[str, object]:
    """What the run and what followed came to, whatever the place of the model that answers."""
    run_dir = Path(config.run_dir)
    found: dict[str, object] = outcome(config)
    for name in ("samples", "verdicts"):
        lines = map(json.loads, (run_dir / "winrate" / f"{name}.jsonl").read_text().splitlines())
        kept = [{key: value for key, value in line.items() if key != "model"} for line in lines]
        found[name] = sorted(kept, key=json.dumps)
    found["figures"] = json.loads((run_dir / "evaluation.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_any_phase_of_a_run_and_after_it_costs_nothing(
    server, make_config, undisturbed, tmp_path, number
):
    config = sampled(make_config, tmp_path / "run")
    for starts, (where, count) in enumerate(PHASES, start=1):
        hooks = [{"where": where, "count": count, "do": number.name}]
        code = server.command(config, *TRAIN, hooks=hooks)
        assert code == STOPPED.code, f"{where}: {server.printed(config)}"
        assert server.printed(config).count("stopped as asked") == starts, where
    assert server.command(config, *TRAIN) == 0, server.printed(config)
    assert "Traceback" not in server.printed(config)
    assert left_by(config) == left_by(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("words", "where", "code", "made"),
    [
        (("report", "RUN"), "report", STOPPED_AT_ONCE.code, "report.html"),
        (("export", "RUN", "--output=RUN/again"), "export", STOPPED_AT_ONCE.code, "again/model.safetensors"),
        (("evaluate", "--run=RUN"), "held-out scoring", STOPPED.code, "evaluation.json"),
    ],
    ids=["report", "export", "evaluate"],
)
def test_a_signal_in_what_is_made_of_a_run_leaves_what_was(
    server, undisturbed, words, where, code, made, number
):
    config, file = undisturbed, Path(undisturbed.run_dir) / made
    line = [word.replace("RUN", config.run_dir) for word in words]
    before = file.read_bytes() if file.exists() else None
    assert server.command(config, *line, hooks=[{"where": where, "count": 1, "do": number.name}]) == code
    assert (file.read_bytes() if file.exists() else None) == before
    assert server.command(config, *line) == 0, server.printed(config)
    assert file.is_file()
    assert "Traceback" not in server.printed(config)
