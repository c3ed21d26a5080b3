"""A long run takes no more of anything at its end than near its start."""

from __future__ import annotations

import json

import pytest
from tiny_run import replace

STEPS = 2000


@pytest.mark.slow
def test_two_thousand_steps_need_no_more_memory_files_threads_or_programs(
    server, make_config, tmp_path, capsys
):
    """The first run warms up what a process keeps; memory is compared within the second, the rest between."""
    settings = {"epochs": 1.0, "eval_every": 200, "save_every": 100}
    runs = [
        replace(
            make_config(tmp_path / f"run{i}", **settings),
            training={"steps": steps},
            optimizer={"learning_rate": 1e-5},
        )
        for i, steps in enumerate((200, STEPS))
    ]
    measured = tmp_path / "measured.jsonl"
    assert server.run(runs, measure=str(measured)) == 0, server.printed(runs[0])
    lines = [json.loads(line) for line in measured.read_text().splitlines()]
    (first_end,) = [i for i, line in enumerate(lines) if str(line["when"]).endswith("run0")]
    second = [line for line in lines[first_end + 1 :] if isinstance(line["when"], int)]
    early, late = second[2], second[-1]
    growth = late["memory"] - early["memory"]
    with capsys.disabled():
        print(
            f"\n{late['when'] - early['when']} steps: {growth / 2**20:+.1f} MiB of "
            f"{early['memory'] / 2**20:.0f}, {late['compilations'] - early['compilations']} compilations; "
            f"after the runs {lines[first_end]['files']} and {lines[-1]['files']} open files, "
            f"{lines[first_end]['threads']} and {lines[-1]['threads']} threads"
        )
    assert growth < 16 * 2**20
    assert late["compilations"] == early["compilations"]
    assert lines[-1]["files"] <= lines[first_end]["files"]
    assert lines[-1]["threads"] <= lines[first_end]["threads"]
