"""The optimum of an objective is what its paper says it is, seen by converging to it.

A prompt with N possible responses, a reference ρ, a known reward r. The optimum of E_π[r] − β KL(π‖ρ) is
π* = ρ exp(r/β) / Z; preferences are drawn from r, and the policy never sees r itself.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from score_cases import make_scores
from transformers import LlamaConfig

from dpo.huggingface.families import decoder_config
from dpo.losses import Scores, make_objective
from dpo.losses.divergences import reward_of_ratio
from dpo.models.decoder import Decoder

N = 5
REWARD = np.array([0.6, -0.3, 0.1, 0.9, -0.7])
REFERENCE = np.array([0.3, 0.1, 0.25, 0.05, 0.3])
BETA = 0.7
TARGET = REFERENCE * np.exp(REWARD / BETA) / np.sum(REFERENCE * np.exp(REWARD / BETA))


def _total_variation(p, q) -> float:
    return 0.5 * float(np.abs(np.asarray(p) - np.asarray(q)).sum())


def _sample_pairs(rng, reward, num) -> tuple[np.ndarray, np.ndarray]:
    """Ordered pairs (winner, loser) and how often each was drawn under Bradley-Terry."""
    pairs = np.array(list(itertools.permutations(range(len(reward)), 2)))
    chance = 1 / (1 + np.exp(reward[pairs[:, 1]] - reward[pairs[:, 0]]))
    return pairs, rng.multinomial(num, chance / chance.sum())


def _sample_rankings(rng, reward, K, num) -> tuple[np.ndarray, np.ndarray]:
    """Rankings of K random responses and how often each was drawn under Plackett-Luce."""
    rankings = np.array(list(itertools.permutations(range(len(reward)), K)))
    weight = np.exp(reward[rankings])
    left = np.cumsum(weight[:, ::-1], axis=1)[:, ::-1]
    chance = np.prod(weight / left, axis=1)
    return rankings, rng.multinomial(num, chance / chance.sum())


def _exact_pairs(reward) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array(list(itertools.permutations(range(len(reward)), 2)))
    return pairs, 1 / (1 + np.exp(reward[pairs[:, 1]] - reward[pairs[:, 0]]))


def _look_up(log_probs, reference, responses, reward=None) -> Scores:
    given = None if reward is None else jnp.asarray(reward)[responses]
    return make_scores(log_probs[responses], jnp.asarray(reference)[responses], scores=given)


def _converge(spec, responses, counts, *, reference=REFERENCE, reward=None, steps=1500) -> np.ndarray:
    """A softmax table trained from the reference by Adam on the counted preferences."""
    objective = make_objective(spec)
    weights = jnp.asarray(counts / counts.sum())
    log_reference = jnp.log(jnp.asarray(reference))

    def loss(logits):
        scores = _look_up(jax.nn.log_softmax(logits), log_reference, responses, reward)
        return jnp.sum(weights * objective(scores))

    return np.asarray(jax.nn.softmax(_adam(loss, log_reference, steps=steps, rate=0.05)))


def _adam(loss, start, *, steps: int, rate: float):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return run((start, optimizer.init(start)))[0]


def _assert_recovers_reward(policy, reference, reward, beta, atol):
    """β log π/ρ is r up to a constant."""
    implicit = beta * np.log(np.asarray(policy) / reference)
    np.testing.assert_allclose(implicit - implicit.mean(), reward - reward.mean(), atol=atol)


def test_dpo_on_sampled_pairs_finds_the_optimum():
    with jax.enable_x64(True):
        drawn = _sample_pairs(np.random.default_rng(0), REWARD, 200_000)
        policy = _converge({"name": "dpo", "beta": BETA}, *drawn)
        assert _total_variation(policy, TARGET) <= 0.02
        _assert_recovers_reward(policy, REFERENCE, REWARD, BETA, atol=0.03)


@pytest.mark.parametrize("K", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_plackett_luce_on_sampled_rankings_finds_the_optimum(K):
    with jax.enable_x64(True):
        drawn = _sample_rankings(np.random.default_rng(1), REWARD, K, 100_000)
        policy = _converge({"name": "plackett_luce", "beta": BETA}, *drawn, steps=600)
        assert _total_variation(policy, TARGET) <= 0.02
        _assert_recovers_reward(policy, REFERENCE, REWARD, BETA, atol=0.03)


def test_softmax_best_of_plackett_luce_choices_finds_the_optimum():
    """Luce's choice model is identified by which of K is best."""
    with jax.enable_x64(True):
        drawn = _sample_rankings(np.random.default_rng(2), REWARD, 3, 300_000)
        policy = _converge({"name": "softmax_best", "beta": BETA}, *drawn, steps=600)
        assert _total_variation(policy, TARGET) <= 0.02


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "reward_distillation", "beta": BETA},  # regression of the exact differences
        {"name": "infonca", "beta": BETA, "alpha": 1.0},  # softmax(r) = softmax(β log π/ρ)
    ],
)
def test_given_scores_find_the_optimum_without_labels(spec):
    with jax.enable_x64(True):
        ranking = np.argsort(-REWARD)[None]
        policy = _converge(spec, ranking, np.ones(1), reward=REWARD)
        assert _total_variation(policy, TARGET) <= 1e-3


def test_robust_undoes_the_label_noise_that_dpo_learns():
    with jax.enable_x64(True):
        pairs, clean = _exact_pairs(REWARD)
        noisy = 0.8 * clean + 0.2 * (1 - clean)
        robust = _converge({"name": "robust", "beta": BETA, "label_smoothing": 0.2}, pairs, noisy)
        plain = _converge({"name": "dpo", "beta": BETA}, pairs, noisy)
        assert _total_variation(robust, TARGET) <= 2e-3
        assert _total_variation(plain, TARGET) > 0.05


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", 0.5])
def test_divergences_find_their_own_optimum(divergence):
    """π* = ρ (f′)⁻¹((r − λ)/β), λ such that it sums to one: the optimum of E_π[r] − β D_f(π‖ρ)."""

    def tilted(multiplier):
        u = (REWARD - multiplier) / BETA
        if divergence == "jensen_shannon":
            return REFERENCE * np.exp(u) / (2.0 - np.exp(u))
        alpha = 0.0 if divergence == "forward_kl" else divergence
        return REFERENCE * (1.0 + (alpha - 1.0) * u) ** (1.0 / (alpha - 1.0))

    limit = {"jensen_shannon": BETA * np.log(2.0), "forward_kl": BETA, 0.5: 2 * BETA}[divergence]
    low, high = REWARD.max() - limit + 1e-9, REWARD.max() + 10.0  # the mass falls from ∞ to 0 in between
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if tilted(middle).sum() > 1.0 else (low, middle)
    target = tilted(low)

    with jax.enable_x64(True):
        policy = _converge({"name": "dpo", "beta": BETA, "divergence": divergence}, *_exact_pairs(REWARD))
        assert _total_variation(policy, target) <= 2e-3
        assert _total_variation(target, TARGET) > 0.02  # and it is another one than reverse KL's
        implicit = BETA * reward_of_ratio(jnp.log(policy / REFERENCE), divergence)
        np.testing.assert_allclose(implicit - implicit.mean(), REWARD - REWARD.mean(), atol=0.02)


@pytest.mark.parametrize("certainty", [0.7, 1.0])
def test_ipo_stops_at_a_finite_gap(certainty):
    """(2p − 1)/(2β) for two responses of which one wins with probability p, certain or not."""
    beta, pairs = 0.4, np.array([[0, 1], [1, 0]])
    with jax.enable_x64(True):
        counts = np.array([certainty, 1 - certainty])
        policy = _converge({"name": "ipo", "beta": beta}, pairs, counts, reference=np.array([0.5, 0.5]))
        assert np.log(policy[0] / policy[1]) == pytest.approx((2 * certainty - 1) / (2 * beta), abs=1e-3)


def test_certain_labels_drive_dpo_on_but_not_ipo_nor_smoothed_dpo():
    pairs, counts, even = np.array([[0, 1]]), np.ones(1), np.array([0.5, 0.5])
    with jax.enable_x64(True):
        gaps = {}
        for name, extra in [("dpo", {}), ("ipo", {}), ("exo", {"label_smoothing": 0.1})]:
            policy = _converge({"name": name, "beta": 1.0, **extra}, pairs, counts, reference=even)
            gaps[name] = np.log(policy[0] / policy[1])
        smoothed = _converge(
            {"name": "dpo", "beta": 1.0, "label_smoothing": 0.1}, pairs, counts, reference=even
        )
        assert gaps["dpo"] > 5.0
        assert gaps["ipo"] == pytest.approx(0.5, abs=1e-3)
        logit = np.log(0.9 / 0.1)
        assert gaps["exo"] == pytest.approx(logit, abs=1e-2)
        assert np.log(smoothed[0] / smoothed[1]) == pytest.approx(logit, abs=1e-2)


@pytest.mark.parametrize(
    ("spec", "log_ratio"),
    [
        ({"name": "sppo_hard", "beta": 0.2}, [2.5, -2.5]),  # ±1/(2β)
        ({"name": "ipo_norm", "beta": 0.5}, [4.0, 0.0]),  # 1/(2β) a token, 4 tokens
        ({"name": "hinge", "beta": 0.5}, [2.5, 0.0]),  # any δ > 1
        ({"name": "reward_distillation", "beta": 0.5}, [4.0, 0.0]),  # δ = the scores' difference, 2
        ({"name": "exo", "beta": 0.5, "label_smoothing": 0.1}, [2 * np.log(9.0), 0.0]),
    ],
)
def test_gradient_vanishes_where_the_paper_says(spec, log_ratio):
    with jax.enable_x64(True):
        objective = make_objective(spec)
        scores = make_scores([log_ratio], lengths=[[4, 4]], scores=[[2.0, 0.0]])
        slope = jax.grad(lambda policy: objective(scores._replace(policy=policy)).sum())(scores.policy)
        np.testing.assert_allclose(slope, 0.0, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", pytest.param("plackett_luce", marks=pytest.mark.slow)])
def test_a_tiny_decoder_finds_the_optimum_over_all_its_responses(name):
    """Two tokens out of four: sixteen responses, enumerated, whose probabilities sum to one.

    The prompt is a fifth token: a decoder without a start token cannot tell "a" from "a a".
    """
    V, beta = 4, 1.0
    responses = np.array(list(itertools.product(range(V), repeat=2)))
    tokens = np.concatenate([np.full((V * V, 1), V), responses], axis=1)
    model = _tiny_decoder(V + 1)
    graphdef, params = nnx.split(model)

    def log_probs(params):
        rows = jnp.asarray(tokens)
        positions = jnp.broadcast_to(jnp.arange(3), rows.shape)
        branch = jnp.minimum(positions, 1)
        decoder = nnx.merge(graphdef, params)
        logits = decoder.logits(decoder.hidden(rows, positions, jnp.ones_like(rows), branch))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :2, :V]), rows[:, 1:, None], axis=2)
        return chosen[..., 0].sum(axis=1)

    reference = jax.jit(log_probs)(params)
    assert float(jnp.exp(reference).sum()) == pytest.approx(1.0, abs=1e-5)

    rng = np.random.default_rng(3)
    reward = rng.normal(size=V * V)
    target = np.exp(np.asarray(reference) + reward / beta)
    target /= target.sum()
    if name == "dpo":
        drawn, counts = _sample_pairs(rng, reward, 400_000)
    else:
        drawn, counts = _sample_rankings(rng, reward, 3, 400_000)
    objective, weights = make_objective({"name": name, "beta": beta}), jnp.asarray(counts / counts.sum())

    def loss(params):
        return jnp.sum(weights * objective(_look_up(log_probs(params), reference, drawn)))

    trained = _adam(loss, params, steps=300, rate=2e-2)
    policy = np.exp(jax.jit(log_probs)(trained))
    assert _total_variation(np.exp(reference), target) > 0.2  # it started elsewhere
    assert _total_variation(policy, target) <= 0.02
    _assert_recovers_reward(policy, np.exp(reference), reward, beta, atol=0.1)


def _tiny_decoder(vocab_size: int) -> Decoder:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Decoder(decoder_config(config), rngs=nnx.Rngs(0), remat="none", attention="plain")
