import math

import jax.numpy as jnp
import pytest
from test_checkpoint import save, state_of

from dpo.config import TrainingConfig
from dpo.training.checkpoint import Checkpoints
from dpo.training.saving import Saver, find_resume

MARGIN = "rewards/margins"


def saver(checkpoints, *, evaluations=(), clock=lambda: 0.0, **settings) -> Saver:
    settings = {"eval_every": 1, **settings}
    return Saver(
        checkpoints,
        {"settings": {}},
        settings=TrainingConfig(**settings),
        probe=lambda state: {"rows": [0], "logps": [[float(state.step)]]},
        evaluations=evaluations,
        clock=clock,
    )


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        yield checkpoints


def test_saves_are_due_by_steps(checkpoints):
    by_steps = saver(checkpoints, save_every=3)
    assert [step for step in range(1, 10) if by_steps.due(step)] == [3, 6, 9]
    assert not any(saver(checkpoints).due(step) for step in range(1, 10))


def test_saves_are_due_by_minutes_since_the_last_one(checkpoints):
    now = 0.0
    by_time = saver(checkpoints, save_minutes=2.0, clock=lambda: now)
    due = []
    for step in range(1, 10):
        now += 50.0
        if by_time.due(step):
            by_time.save(step, state_of(step))
            due.append(step)
    assert due == [3, 6, 9]


def test_each_new_best_is_due_and_stays(checkpoints):
    best = saver(checkpoints, keep_best=MARGIN)
    for step, margin in enumerate([0.1, 0.3, math.nan, 0.3, 0.2, 0.2], start=1):
        best.judge(step, {MARGIN: margin})
        if best.is_best(step) or step > 3:
            best.save(step, state_of(step))
    checkpoints.wait()
    assert best.best == 2
    assert checkpoints.steps == [2, 6]


def test_the_best_is_known_again_from_the_metrics(checkpoints):
    for step in (2, 4):
        checkpoints.save(step, state_of(step), {}, protect=[2])
    lines = [{"step": step, f"eval/{MARGIN}": value} for step, value in ((1, 9.0), (2, 3.0), (4, 2.0))]
    again = saver(checkpoints, evaluations=lines, keep_best=MARGIN)
    assert again.best == 2  # the checkpoint of step 1 is not there
    assert not again.is_best(5)
    again.judge(5, {MARGIN: 3.5})
    assert again.is_best(5)


def find(checkpoints, tmp_path, **settings):
    said: list[str] = []
    resume = find_resume(
        checkpoints,
        {"settings": {"step": 2}},
        settings=TrainingConfig(**settings),
        run_dir=tmp_path,
        num_steps=5,
        log=said.append,
    )
    return resume, said


def test_a_new_run_starts_at_zero(checkpoints, tmp_path):
    assert find(checkpoints, tmp_path)[0].step == 0


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path):
    save(tmp_path / "checkpoints", 2, 4)
    (tmp_path / "checkpoints" / "4" / "identity.json").unlink()
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        resume, said = find(checkpoints, tmp_path)
    assert resume.step == 2
    assert said[0].startswith(
        "damaged checkpoint: step 4 (identity.json: No such file or directory); kept as"
    )
    assert said[1] == "going on from step 2, the newest checkpoint that is whole"


def test_a_refusal_changes_nothing(tmp_path):
    save(tmp_path / "checkpoints", 3, 4)
    (tmp_path / "checkpoints" / "4" / "identity.json").unlink()
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        with pytest.raises(ValueError, match="other settings:\n  settings: step: 3 → 2"):
            find(checkpoints, tmp_path)
        assert checkpoints.steps == [3, 4]
        with pytest.raises(ValueError, match=r"training\.resume is 'never'"):
            find(checkpoints, tmp_path, resume="never")


def test_the_probe_is_saved_with_the_state(checkpoints):
    saver(checkpoints).save(3, state_of(3))
    checkpoints.wait()
    assert checkpoints.identity(3)["probe"] == {"rows": [0], "logps": [[3.0]]}
    assert int(checkpoints.restore(3, state_of(0)).step) == jnp.asarray(3)
