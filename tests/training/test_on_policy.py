"""Samples of the policy and their log-ratio to the reference, against what `dpo winrate` computes."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_model import write_tiny_model

from dpo.config import MeshConfig, ModelConfig
from dpo.huggingface.pretrained import stop_tokens
from dpo.judging.local_judge import sequence_log_probs
from dpo.models.sampling import generate
from dpo.parallel.sharding import make_mesh
from dpo.training.on_policy import OnPolicy
from dpo.training.policy import load_policy

PROMPTS = [[1, 5, 6], [1, 9, 9, 9, 20], [1, 40]]


@pytest.fixture
def on_policy(tiny_model_dir: Path) -> OnPolicy:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    reference = load_policy(ModelConfig(source=str(tiny_model_dir)), mesh)
    stop = stop_tokens(reference.pretrained)
    return OnPolicy(reference, PROMPTS, mesh=mesh, max_new_tokens=8, stop_tokens=stop, chunk=64, seed=3)


def test_the_log_ratio_is_that_of_the_whole_response(
    on_policy: OnPolicy, tiny_model_dir, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path, seed=1)
    params = load_policy(ModelConfig(source=str(other)), make_mesh(MeshConfig(), jax.devices()[:1])).params
    drawn = on_policy.draw(params)
    assert all(1 <= len(response) <= 8 for response in drawn.responses)
    ours, theirs = (sequence_log_probs(str(s), PROMPTS, drawn.responses) for s in (other, tiny_model_dir))
    np.testing.assert_allclose(drawn.log_ratio, ours - theirs, atol=1e-4)
    metrics = on_policy(5, params)
    assert metrics["samples/kl"] == pytest.approx((ours - theirs).mean(), abs=1e-4)
    assert metrics["samples/length"] == np.mean([len(response) for response in drawn.responses])


def test_the_reference_has_no_kl_from_itself_and_the_same_samples_every_time(on_policy: OnPolicy) -> None:
    params = on_policy._reference.params
    first, again = on_policy.draw(params), on_policy.draw(params)
    assert first.responses == again.responses
    np.testing.assert_array_equal(first.log_ratio, 0.0)


@pytest.mark.ci
def test_more_prompts_than_a_batch_are_all_scored(tiny_model_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr("dpo.training.on_policy.ROWS", 2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    reference = load_policy(ModelConfig(source=str(tiny_model_dir)), mesh)
    sampler = OnPolicy(reference, PROMPTS, mesh=mesh, max_new_tokens=4, stop_tokens=[0], chunk=64)
    logps = sampler._logps([[7, 8], [9], [10, 11, 12]], sampler._score_with(reference.params))
    expected = sequence_log_probs(str(tiny_model_dir), PROMPTS, [[7, 8], [9], [10, 11, 12]])
    np.testing.assert_allclose(logps, expected, atol=1e-4)


@pytest.mark.ci
def test_samples_are_drawn_in_batches_and_are_the_same(tiny_model_dir: Path, monkeypatch) -> None:
    """The cache of so many rows at a time is held, not that of all prompts."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    reference = load_policy(ModelConfig(source=str(tiny_model_dir)), mesh)
    rows = []

    def spy(model, prompts, *, batch_size, **how):
        rows.append(batch_size)
        return generate(model, prompts, batch_size=batch_size, **how)

    monkeypatch.setattr("dpo.training.on_policy.generate", spy)
    drawn = []
    for at_once in (2, 32):
        monkeypatch.setattr("dpo.training.on_policy.ROWS", at_once)
        sampler = OnPolicy(reference, PROMPTS, mesh=mesh, max_new_tokens=4, stop_tokens=[0], chunk=64)
        drawn.append(sampler.draw(reference.params).responses)
    assert rows == [2, 32]
    assert drawn[0] == drawn[1]
