"""The length-controlled figure: its objective's optimum, planted truths, and judges that it exposes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from dpo.judging import length_control
from dpo.judging.length_control import fit_logistic, length_controlled


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def planted(n: int, *, quality: float, length: float, mean_gap: float, seed: int):
    """Verdicts drawn from AlpacaEval's model: outcomes and length gaps."""
    rng = np.random.default_rng(seed)
    gap = rng.normal(mean_gap, 100.0, n)
    chance = sigmoid(quality + length * np.tanh(gap / gap.std(ddof=1)))
    return (rng.random(n) < chance).astype(float), gap


def test_the_fit_is_the_optimum_of_its_objective() -> None:
    """A general optimiser on the written-out log-loss finds the same coefficients, ties included."""
    rng = np.random.default_rng(0)
    feature, target = np.tanh(rng.normal(size=60)), rng.choice([0.0, 0.5, 1.0], 60)
    weights = rng.integers(0, 4, (3, 60)).astype(float)

    def objective(w, row):
        eta = w[0] + w[1] * feature
        loss = np.logaddexp(0, eta) - target * eta
        return row @ loss + 0.01 / 2 * w @ w

    expected = [optimize.minimize(objective, np.zeros(2), args=(row,), tol=1e-12).x for row in weights]
    np.testing.assert_allclose(fit_logistic(feature, target, weights), expected, atol=1e-5)


def test_planted_coefficients_are_found() -> None:
    values, gap = planted(20_000, quality=0.4, length=1.2, mean_gap=60.0, seed=1)
    result = length_controlled(values, gap, np.arange(len(gap)), resamples=50)
    assert result is not None
    assert result.quality == pytest.approx(0.4, abs=0.08)
    assert result.length == pytest.approx(1.2, abs=0.12)
    assert result.win_rate.estimate == pytest.approx(sigmoid(0.4), abs=0.02)
    assert values.mean() > sigmoid(0.4) + 0.05  # what the plain figure gives away to length


def test_without_a_length_effect_it_is_the_plain_win_rate() -> None:
    values, gap = planted(20_000, quality=0.4, length=0.0, mean_gap=60.0, seed=2)
    result = length_controlled(values, gap, np.arange(len(gap)), resamples=50)
    assert result is not None
    assert result.win_rate.estimate == pytest.approx(values.mean(), abs=0.01)


def test_a_judge_that_prefers_the_longer_is_exposed() -> None:
    """The policy is longer in 4 of 5 pairs and wins just those: 80% plainly, one half at equal lengths."""
    results, plain = [], []
    for seed in range(10):
        gap = np.random.default_rng(seed).normal(84.0, 100.0, 400)
        results.append(length_controlled((gap > 0).astype(float), gap, np.arange(400), resamples=20))
        plain.append(np.mean(gap > 0))
    assert min(plain) > 0.75
    estimates = [result.win_rate.estimate for result in results if result is not None]
    assert np.mean(estimates) == pytest.approx(0.5, abs=0.08)
    assert max(estimates) < 0.7
    assert all(result is not None and result.length > 10 for result in results)


def test_swapping_the_players_mirrors_the_figure() -> None:
    values, gap = planted(300, quality=0.8, length=0.5, mean_gap=20.0, seed=4)
    ours = length_controlled(values, gap, np.arange(300), resamples=20)
    theirs = length_controlled(1 - values, -gap, np.arange(300), resamples=20)
    assert ours is not None
    assert theirs is not None
    assert theirs.win_rate.estimate == pytest.approx(1 - ours.win_rate.estimate)
    assert (theirs.quality, theirs.length) == pytest.approx((-ours.quality, ours.length))


def test_the_figures_are_those_of_fits_to_all_and_to_each_draw_of_whole_prompts() -> None:
    """The defaults written out, on so few pairs that every divisor shows; one gap is zero."""
    values, gap = np.array([1.0, 0.0, 0.5, 1.0, 0.0]), np.array([30.0, -10.0, 0.0, 5.0, 4.0])
    names = np.array(["a", "a", "b", "c", "c"])
    found = length_controlled(values, gap, names)
    assert found is not None
    feature = np.tanh(gap / gap.std(ddof=1))
    quality, length = fit_logistic(feature, values, np.ones((1, 5)))[0]
    drawn = np.random.default_rng(0).multinomial(3, [1 / 3] * 3, size=1000)[:, [0, 0, 1, 2, 2]]
    draws = sigmoid(fit_logistic(feature, values, drawn.astype(float))[:, 0])
    assert found.win_rate == pytest.approx((sigmoid(quality), *np.quantile(draws, [0.025, 0.975])))
    assert found[1:] == pytest.approx((quality, length, 0.7))


def test_draws_that_are_fitted_some_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, gap = planted(20, quality=0.8, length=0.5, mean_gap=20.0, seed=4)
    whole = length_controlled(values, gap, np.arange(20), resamples=50)
    monkeypatch.setattr(length_control, "_AT_A_TIME", 20 * 7)
    pieces = length_controlled(values, gap, np.arange(20), resamples=50)
    assert whole is not None
    assert pieces is not None
    assert pieces.win_rate == pytest.approx(whole.win_rate)


def test_draws_are_as_many_as_asked_for_and_of_the_seed() -> None:
    values, gap = planted(20, quality=0.8, length=0.5, mean_gap=20.0, seed=4)
    found = length_controlled(values, gap, np.arange(20))
    assert found == length_controlled(values, gap, np.arange(20), seed=0, resamples=1000, confidence=0.95)
    assert found != length_controlled(values, gap, np.arange(20), seed=1)
    single = length_controlled(values, gap, np.arange(20), resamples=1)
    assert single is not None
    assert single.win_rate.low == single.win_rate.high


def test_two_pairs_are_enough_to_fit() -> None:
    assert length_controlled(np.array([1.0, 0.0]), np.array([1.0, 2.0]), np.arange(2)) is not None


@pytest.mark.parametrize("gap", [[0.0, 0.0, 0.0], [12.0, 12.0, 12.0], [5.0]])
def test_equal_gaps_tell_nothing(gap: list[float]) -> None:
    assert length_controlled(np.ones(len(gap)), np.array(gap), np.arange(len(gap))) is None


def test_outcomes_that_are_all_wins_stay_finite() -> None:
    gap = np.linspace(-50, 200, 40)
    result = length_controlled(np.ones(40), gap, np.arange(40), resamples=50)
    assert result is not None
    assert 0.9 < result.win_rate.low <= result.win_rate.estimate <= 1


def alpaca_eval(values: np.ndarray, gap: np.ndarray) -> float:
    """AlpacaEval 2.0's pipeline with its published settings, less the term for its own instructions.

    src/alpaca_eval/metrics/glm_winrate.py at 1020da2: every verdict twice, as a win weighted by its
    probability and as a loss by the rest; logistic regression on tanh(Δ / std Δ) and a constant, L1,
    liblinear, C by five folds grouped by verdict and scored by log-loss; read off at Δ = 0.
    """
    linear_model = pytest.importorskip("sklearn.linear_model")
    from sklearn.model_selection import GroupKFold

    n = len(values)
    features = np.stack([np.tanh(gap / gap.std(ddof=1)), np.ones(n)], axis=1)
    doubled, labels = np.concatenate([features, features]), np.repeat([1, 0], n)
    weights, groups = np.concatenate([values, 1 - values]), np.tile(np.arange(n), 2)
    candidates = np.logspace(-4, 4, 10)
    losses = np.zeros(len(candidates))
    for train, test in GroupKFold(5).split(doubled, labels, groups):
        for i, C in enumerate(candidates):
            model = _l1(linear_model, C).fit(doubled[train], labels[train], sample_weight=weights[train])
            log_probs = model.predict_log_proba(doubled[test])[np.arange(len(test)), labels[test]]
            losses[i] -= weights[test] @ log_probs
    best = _l1(linear_model, candidates[losses.argmin()]).fit(doubled, labels, sample_weight=weights)
    return float(sigmoid(best.coef_[0, 1]))


def _l1(linear_model, C: float):
    return linear_model.LogisticRegression(
        C=C, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=123
    )


@pytest.mark.parametrize("kind", ["wins and losses", "ties too", "a judge of length alone"])
def test_it_agrees_with_alpaca_evals_pipeline(kind: str) -> None:
    """On planted verdicts the two regularisations differ by little: 0.02 where the interval is 0.12 wide."""
    values, gap = planted(400, quality=0.5, length=1.0, mean_gap=60.0, seed=6)
    if kind == "ties too":
        values = np.where(np.random.default_rng(7).random(400) < 0.3, 0.5, values)
    if kind == "a judge of length alone":
        values = sigmoid(3 * np.tanh(gap / gap.std(ddof=1)))
    ours = length_controlled(values, gap, np.arange(400), resamples=20)
    assert ours is not None
    assert ours.win_rate.estimate == pytest.approx(alpaca_eval(values, gap), abs=0.02)


@pytest.mark.ci
def test_the_interval_covers_19_of_20() -> None:
    """150 prompts with 2 samples each that share a random effect; the truth is the marginal win-rate at 0."""
    rng = np.random.default_rng(5)
    effect = rng.normal(0, 0.7, 200_000)
    truth = sigmoid(0.5 + effect).mean()
    names, covered = np.repeat(np.arange(150), 2), np.zeros(500)
    for trial in range(len(covered)):
        gap = rng.normal(40, 100, 300)
        own = np.repeat(rng.normal(0, 0.7, 150), 2)
        values = (rng.random(300) < sigmoid(0.5 + own + np.tanh(gap / gap.std(ddof=1)))).astype(float)
        result = length_controlled(values, gap, names, seed=trial, resamples=200)
        assert result is not None
        covered[trial] = result.win_rate.low <= truth <= result.win_rate.high
    assert covered.mean() == pytest.approx(0.95, abs=0.025)
