"""Held-out figures against scipy, brute force and what must hold whatever the numbers are."""

from __future__ import annotations

import json
from itertools import permutations

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo.evaluation import accuracy as acc
from dpo.evaluation import ranking
from dpo.evaluation.accuracy import describe
from dpo.evaluation.rows import Rows, make_pairs
from dpo.losses.scores import Scores
from dpo.pages.accuracy_text import figures_as_text
from dpo.training.metrics import RESOLUTION, preference_metrics


def make_rows(seed: int = 0, *, n: int = 60, K: int = 5, ragged: bool = True, ties: bool = True) -> Rows:
    """Random rankings: ragged, with ties, rubbish where absent, two rows to a prompt."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, K + 1, n) if ragged else np.full(n, K)
    present = np.arange(K)[None] < counts[:, None]
    steps = rng.integers(0 if ties else 1, 2, (n, K)) if ties else np.ones((n, K), int)
    ranks = np.cumsum(steps, axis=1) - steps[:, :1]
    policy = rng.normal(-50, 10, (n, K))
    return Rows(
        policy=np.where(present, policy, np.nan),
        reference=np.where(present, policy + rng.normal(0, 5, (n, K)) + 2 * ranks, np.nan),
        lengths=np.where(present, rng.integers(1, 90, (n, K)), 0),
        present=present,
        ranks=ranks,
        prompts=np.arange(n) // 2,
        sources=np.where(np.arange(n) % 3 == 0, "a", "b"),
    )


def pair_rows(delta: np.ndarray, **changes: np.ndarray) -> Rows:
    """Pairs whose log-ratio of the better minus that of the worse response is `delta`."""
    n = len(delta)
    rows = Rows(
        policy=np.stack([delta, np.zeros(n)], 1) - 10.0,
        reference=np.full((n, 2), -10.0),
        lengths=np.full((n, 2), 7),
        present=np.ones((n, 2), bool),
        ranks=np.tile([0, 1], (n, 1)),
        prompts=np.arange(n),
        sources=np.full(n, "all"),
    )
    return rows._replace(**changes)


def test_accuracy_of_pairs_is_the_part_with_positive_delta() -> None:
    result = describe(pair_rows(np.array([3.0, -1.0, 2.0, 0.0])), beta=0.1)
    assert result["accuracy"][0] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert result["ties"] == 1
    assert result["margin"][0] == pytest.approx(0.1 * 4.0 / 4)
    assert "accuracy_wilson" in result
    assert result["accuracy_wilson"][0] == pytest.approx(result["accuracy"][0])
    assert "rankings" not in result


def test_accuracy_of_rankings_is_the_brute_force_mean_within_then_over_prompts() -> None:
    rows = make_rows(1)
    pairs = make_pairs(rows)
    assert np.abs(pairs.gap(rows.log_ratio)).min() > 0.001, "no pair that rounding might order"
    expected = []
    for policy, reference, present, ranks in zip(*rows[:2], *rows[3:5], strict=True):
        right = [
            float(policy[i] - reference[i] > policy[j] - reference[j])
            for i in range(len(ranks))
            for j in range(len(ranks))
            if present[i] and present[j] and ranks[i] < ranks[j]
        ]
        expected += [np.mean(right)] if right else []
    assert describe(rows, beta=0.1)["accuracy"][0] == pytest.approx(np.mean(expected))


def test_rows_of_one_prompt_widen_the_interval() -> None:
    delta = np.tile(np.array([1.0, -1.0]), 40)
    apart = describe(pair_rows(delta), beta=1.0)["accuracy"]
    together = describe(pair_rows(np.repeat(delta[:20], 4), prompts=np.arange(80) // 4), beta=1.0)["accuracy"]
    assert apart[0] == together[0] == 0.5
    assert together[2] - together[1] > 1.5 * (apart[2] - apart[1])


def test_kendall_is_scipys_tau_b() -> None:
    rows = make_rows(n=40)
    for row, tau in enumerate(ranking.kendall_tau(rows)):
        kept = rows.present[row]
        if len(set(rows.ranks[row][kept])) > 1:
            expected = stats.kendalltau(-rows.ranks[row][kept], rows.log_ratio[row][kept])[0]
            assert tau == pytest.approx(expected)


def test_ndcg_is_one_for_the_right_order_and_the_formula_elsewhere() -> None:
    rows = make_rows(n=30, ties=False, ragged=False)
    perfect = rows._replace(policy=-rows.ranks.astype(float), reference=np.zeros(rows.ranks.shape))
    np.testing.assert_allclose(ranking.ndcg(perfect), 1.0)
    order = np.argsort(-rows.log_ratio, axis=1)
    gain = 4 - np.take_along_axis(rows.ranks, order, 1)
    discount = 1 / np.log2(np.arange(2, 7))
    np.testing.assert_allclose(ranking.ndcg(rows), gain @ discount / (np.arange(4, -1, -1) @ discount))


def test_ndcg_of_equal_rewards_is_the_mean_over_all_orders() -> None:
    rows = make_rows(n=1, K=4, ties=False, ragged=False)
    equal = rows._replace(policy=rows.reference)
    means = [
        ranking.ndcg(equal._replace(policy=equal.reference + np.array([order], float)))[0]
        for order in permutations(range(4))
    ]
    assert ranking.ndcg(equal)[0] == pytest.approx(np.mean(means))


def test_top_1_shares_the_credit_of_a_tie() -> None:
    rows = make_rows(n=2, K=4, ties=False, ragged=False)
    log_ratio = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    rows = rows._replace(policy=rows.reference + log_ratio)
    np.testing.assert_allclose(
        ranking.top_1(rows._replace(policy=log_ratio, reference=0 * log_ratio)), [0.5, 0.0]
    )


def test_the_likelihood_of_a_guess_is_one_over_the_number_of_orders() -> None:
    rows = make_rows(ties=False)
    guess = ranking.plackett_luce_log_likelihood(rows, beta=0.0)
    expected = [-np.sum(np.log(np.arange(1, count + 1))) for count in rows.present.sum(1)]
    np.testing.assert_allclose(guess, expected, rtol=1e-5)


def test_the_likelihood_is_the_product_of_choices() -> None:
    rows = make_rows(ties=False, ragged=False)
    reward = 0.3 * rows.log_ratio
    expected = sum(reward[:, k] - np.log(np.exp(reward[:, k:]).sum(1)) for k in range(reward.shape[1]))
    np.testing.assert_allclose(ranking.plackett_luce_log_likelihood(rows, beta=0.3), expected, rtol=1e-4)


def test_a_policy_that_prefers_length_is_exposed_by_the_baseline_and_the_split() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 100, (400, 2))
    longer = np.sign(lengths[:, 0] - lengths[:, 1]).astype(float)
    result = describe(pair_rows(longer, lengths=lengths), beta=1.0)
    assert result["accuracy"] == result["baselines"]["longer"]
    assert result["over_baselines"]["longer"] == [0.0, 0.0, 0.0], "paired: it is right where length is"
    assert result["by_length"]["better_is_longer"]["accuracy"][0] == 1.0
    assert result["by_length"]["better_is_shorter"]["accuracy"][0] == 0.0


def test_the_gain_over_a_baseline_is_paired() -> None:
    """Both are right on the same half, the policy alone on one more tenth: its gain is above zero."""
    delta = np.repeat([1.0, 1.0, -1.0], [50, 10, 40])
    lengths = np.repeat([[9, 5], [5, 9], [5, 9]], [50, 10, 40], axis=0)
    result = describe(pair_rows(delta, lengths=lengths), beta=1.0)
    estimate, low, _ = result["over_baselines"]["longer"]
    assert estimate == pytest.approx(result["accuracy"][0] - result["baselines"]["longer"][0])
    assert low > 0
    assert result["accuracy"][1] < result["baselines"]["longer"][2], "the intervals overlap nevertheless"


def test_a_calibrated_policy_has_no_calibration_error_and_a_bold_one_has() -> None:
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 2, 40_000))
    right = rng.random(len(size)) < 1 / (1 + np.exp(-size))
    delta = np.where(right, size, -size)
    assert acc.calibration(delta, np.ones(len(delta)))["ece"] < 0.01
    bold = acc.calibration(5 * delta, np.ones(len(delta)))
    assert bold["ece"] > 0.1
    assert sum(bold["share"]) == pytest.approx(1.0)
    assert sum(bold["pairs"]) == len(delta)


def test_the_calibration_bins_are_their_members_means() -> None:
    delta = np.array([0.0, 0.1, -0.1, 4.0, -4.0, 4.0])
    bins = describe(pair_rows(delta), beta=1.0)["calibration"]
    assert bins["accuracy"] == pytest.approx([0.5, 2 / 3])
    assert bins["confidence"][1] == pytest.approx(1 / (1 + np.exp(-4.0)))


def test_subsets_are_described_apart() -> None:
    rows = make_rows()
    result = describe(rows, beta=0.1).get("by_source", {})
    assert set(result) == {"a", "b"}
    assert result["a"]["pairs"] + result["b"]["pairs"] == len(make_pairs(rows).row)
    alone = describe(rows.take(rows.sources == "a"), beta=0.1)
    same = ("pairs", "prompts", "accuracy", "ties", "margin", "calibration")
    part = {name: value for name, value in result["a"].items() if name != "log_ratio"}
    assert part == {name: alone[name] for name in same} | alone["baselines"]


def test_parts_of_pairs_have_the_figures_of_these_pairs_alone() -> None:
    """By length difference: accuracy with ties apart, margin, log-ratios of both sides, calibration."""
    rng = np.random.default_rng(0)
    lengths, delta = rng.integers(5, 9, (60, 2)), rng.normal(0.5, 2, 60)
    delta[:6] = 0.0
    rows = pair_rows(delta, lengths=lengths)
    parts = describe(rows, beta=0.1)["by_length"]
    longer = np.sign(lengths[:, 0] - lengths[:, 1])
    for name, sign in (("better_is_longer", 1), ("better_is_shorter", -1), ("both_are_as_long", 0)):
        alone = describe(rows.take(longer == sign), beta=0.1)
        for figure in ("pairs", "prompts", "accuracy", "ties", "margin", "calibration"):
            assert parts[name][figure] == alone[figure], figure
        for side in ("chosen", "rejected"):
            assert parts[name].get("log_ratio", {})[side] == alone["log_ratio"][side]
    assert sum(part["ties"] for part in parts.values()) == 6


def labelled_rows(log_ratio: list[float], desirable: list[bool], **changes: np.ndarray) -> Rows:
    """One response a row."""
    n = len(log_ratio)
    rows = Rows(
        policy=np.array([log_ratio]).T - 10.0,
        reference=np.full((n, 1), -10.0),
        lengths=np.full((n, 1), 4),
        present=np.ones((n, 1), bool),
        ranks=np.where(np.array([desirable]).T, 0, 1),
        prompts=np.arange(n),
        sources=np.full(n, "all"),
    )
    return rows._replace(**changes)


def test_labelled_responses_are_right_when_they_moved_as_they_should() -> None:
    rows = labelled_rows([2.0, 1.0, -1.0, -4.0, 0.0], [True, False, False, True, True])
    result = describe(rows, beta=0.5)
    assert result["unpaired"]
    assert result["accuracy"][0] == pytest.approx((1 + 0 + 1 + 0 + 0.5) / 5)
    assert result["ties"] == 1
    assert result["margin"][0] == pytest.approx(0.5 * (2 - 1 + 1 - 4) / 5)
    assert result["log_ratio"]["chosen"][0] == pytest.approx(-2 / 3)
    assert result["log_ratio"]["rejected"][0] == pytest.approx(0.0)
    assert "log_ratio" not in result["by_length"]["both_are_as_long"], (
        "half of it would be the reference's own"
    )
    json.dumps(result, allow_nan=False)


def test_baselines_of_labelled_responses_go_by_the_side_of_the_median() -> None:
    lengths = np.array([[9], [9], [2], [2], [5]])
    result = describe(labelled_rows([0.0] * 5, [True, False, True, False, True], lengths=lengths), beta=0.1)
    assert result["baselines"]["longer"][0] == pytest.approx((1 + 0 + 0 + 1 + 0.5) / 5)


def test_labels_that_are_all_good_have_no_rejected_side() -> None:
    result = describe(labelled_rows([1.0, -1.0], [True, True]), beta=0.1)
    assert set(result["log_ratio"]) == {"chosen", "chosen_per_token"}
    assert result["accuracy"][0] == 0.5


def test_log_ratios_have_intervals_and_per_token_ones_weigh_by_length() -> None:
    rows = pair_rows(np.array([3.0, 1.0, 5.0]), lengths=np.array([[1, 2], [2, 2], [3, 2]]))
    found = describe(rows, beta=0.1)["log_ratio"]
    assert found["chosen"][0] == pytest.approx(3.0)
    assert found["chosen"][1] < 3.0 < found["chosen"][2]
    assert found["chosen_per_token"][0] == pytest.approx(9 / 6)
    assert found["rejected"] == [0.0, 0.0, 0.0]


def test_wilson_is_not_given_where_rows_share_a_prompt() -> None:
    rows = pair_rows(np.array([1.0, -1.0, 2.0, 3.0]))
    assert "accuracy_wilson" in describe(rows, beta=0.1)
    assert "accuracy_wilson" not in describe(rows._replace(prompts=np.array([0, 0, 1, 2])), beta=0.1)


def test_prompts_are_those_that_state_a_preference() -> None:
    rows = pair_rows(np.array([1.0, -1.0]), ranks=np.array([[0, 1], [0, 0]]))
    assert describe(rows, beta=0.1)["prompts"] == 1


def test_an_interval_that_says_nothing_is_said_to() -> None:
    one = describe(pair_rows(np.array([1.0])), beta=0.1)
    assert any(text.startswith("1 prompt:") for text in acc.cautions(one))
    few = describe(pair_rows(np.array([1.0, -1.0, 1.0])), beta=0.1)
    assert acc.cautions(few) == ["3 prompts: intervals that draw fewer than 10 prompts are too narrow"]
    alike = describe(pair_rows(np.ones(20)), beta=0.1)
    assert alike["accuracy"] == pytest.approx([1.0, 0.839, 1.0], abs=1e-3)
    assert acc.cautions(alike) == [
        "all prompts came out alike, so that a bootstrap has no spread: the interval of the accuracy is "
        "Wilson's"
    ]
    assert acc.cautions(describe(pair_rows(np.tile([1.0, -1.0], 10)), beta=0.1)) == []
    both = pair_rows(np.tile([1.0, -1.0], 10), sources=np.array(["a"] * 18 + ["b"] * 2))
    assert acc.cautions(describe(both, beta=0.1)) == [
        "the interval of the mean of the sources is too narrow: few prompts in b"
    ]


def test_a_part_has_the_interval_that_it_can_have() -> None:
    """The bootstrap's; Wilson's where all came out alike; none of few prompts."""
    delta, lengths = np.ones(29), np.full((29, 2), 7)
    lengths[:20, 0], lengths[20:24, 0] = 9, 5
    parts = describe(pair_rows(delta, lengths=lengths), beta=0.1)["by_length"]
    interval, remark = acc.part_interval(parts["better_is_longer"])
    assert interval == pytest.approx((1.0, 0.8389, 1.0), abs=1e-4)
    assert "Wilson" in remark
    assert acc.part_interval(parts["better_is_shorter"]) == (None, "too few prompts for an interval")
    delta[:5] = -1.0
    part = describe(pair_rows(delta, lengths=lengths), beta=0.1)["by_length"]["better_is_longer"]
    assert acc.part_interval(part) == (part["accuracy"], "")


def test_everything_is_plain_json_and_does_not_depend_on_rubbish_where_absent() -> None:
    rows = make_rows()
    other = rows._replace(policy=np.where(rows.present, rows.policy, 1e30))
    first, second = describe(rows, beta=0.1), describe(other, beta=0.1)
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)


def test_numbers_that_are_none_are_refused_by_row() -> None:
    rows = pair_rows(np.array([1.0, np.nan, 2.0]))
    with pytest.raises(ValueError, match=r"policy log-probs of 1 of 3 rows are not finite \(\[1\]\)"):
        describe(rows, beta=0.1)
    with pytest.raises(ValueError, match=r"not finite \(x\.jsonl:7\)"):
        acc.check_finite(rows, ["x.jsonl:5", "x.jsonl:7", "x.jsonl:8"])


def test_ties_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to be right about"):
        describe(pair_rows(np.ones(3), ranks=np.zeros((3, 2), int)), beta=0.1)


def test_the_mean_of_sources_counts_every_source_the_same() -> None:
    """Nine pairs of one source, all right, and one of another, wrong: one half."""
    rows = pair_rows(np.array([1.0] * 9 + [-1.0]), sources=np.array(["a"] * 9 + ["b"]))
    result = describe(rows, beta=0.1)
    assert "mean_of_sources" in result
    assert result["mean_of_sources"]["accuracy"][0] == pytest.approx(0.5)
    assert result["accuracy"][0] == pytest.approx(0.9)
    assert result["mean_of_sources"]["accuracy"] == [0.5, 0.5, 0.5], "all that differs is the source"
    assert "mean_of_sources" not in describe(pair_rows(np.ones(3)), beta=0.1)


def test_ndcg_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rows = make_rows(n=30, ragged=False)
    rows = rows.take(ranking.has_preference(rows))
    below = (rows.ranks[:, None, :] > rows.ranks[:, :, None]).sum(2)
    for row, value in enumerate(ranking.ndcg(rows)):
        # its "ignore_ties=False" averages the discounts of equal scores, as here
        assert value == pytest.approx(metrics.ndcg_score(below[row][None], rows.log_ratio[row][None]))


def test_the_calibration_curve_is_scikit_learns() -> None:
    calibration = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(3)
    delta = rng.normal(0.5, 2, 500)
    confidence = 1 / (1 + np.exp(-np.abs(delta)))
    right, mean = calibration.calibration_curve(delta > 0, (confidence - 0.5) * 2, n_bins=acc.NUM_BINS)
    ours = acc.calibration(delta, np.ones(len(delta)))
    np.testing.assert_allclose(ours["accuracy"], right)
    np.testing.assert_allclose(ours["confidence"], 0.5 + mean / 2)
    share = np.array(ours["share"])
    assert ours["ece"] == pytest.approx(share @ np.abs(right - (0.5 + mean / 2)))


def test_the_figures_are_printed_with_whole_names_and_no_interval_of_few_prompts() -> None:
    sources = np.repeat(["LLMBar/Adversarial/GPTInst", "LLMBar/Adversarial/GPTOut"], [16, 4])
    figures = describe(pair_rows(np.tile([1.0, -1.0], 10), sources=sources), beta=0.1)
    figures["left_out"] = {}
    lines = {" ".join(line.split()[:1]): line for line in figures_as_text(figures).splitlines()}
    assert "0.500  95%" in lines["LLMBar/Adversarial/GPTInst"]
    few = lines["LLMBar/Adversarial/GPTOut"]
    assert "  LLMBar/Adversarial/GPTOut  0.500  (4 pairs, too few prompts for an interval, margin" in few
    assert "95%" not in few
    assert "(policy +0.000, 95% -" in lines["longer"]
    assert "! the interval of the mean of the sources is too narrow" in figures_as_text(figures)


def test_a_pair_is_a_tie_where_training_counts_it_as_one() -> None:
    """Two responses' rounding adds up: a gap of 1.5 times what one alone may have orders nothing."""
    one = RESOLUTION * np.finfo(np.float32).eps * 32  # of a log-prob of 32
    policy = np.full((3, 2), -32.0)
    log_ratio = np.array([[1.5 * one, 0.0], [2.5 * one, 0.0], [0.0, 2.5 * one]])
    rows = pair_rows(np.zeros(3), policy=policy, reference=policy - log_ratio)
    result = describe(rows, beta=0.1)
    assert (result["ties"], result["accuracy"][0]) == (1, 0.5)
    scores = Scores(
        policy=jnp.asarray(rows.policy, jnp.float32),
        reference=jnp.asarray(rows.reference, jnp.float32),
        lengths=jnp.asarray(rows.lengths),
        present=jnp.asarray(rows.present),
        ranks=jnp.asarray(rows.ranks),
        scores=jnp.full((3, 2), jnp.nan),
    )
    assert float(preference_metrics(scores, 0.1)["rewards/accuracies"]) == result["accuracy"][0]


@pytest.mark.parametrize("K", [2, 4])
def test_a_policy_that_is_the_reference_but_for_rounding_orders_nothing(K: int) -> None:
    rows = make_rows(n=40, K=K, ragged=False, ties=False)
    noise = np.random.default_rng(1).integers(-30, 31, rows.policy.shape) * np.spacing(np.float32(50))
    result = describe(rows._replace(reference=rows.policy + noise), beta=0.1)
    assert result["accuracy"][0] == 0.5
    assert result["ties"] == result["pairs"]
    assert result["margin"][0] != 0  # values stay as they are
    assert ("rankings" in result) == (K > 2)
    if "rankings" in result:
        assert result["rankings"]["top_1"][0] == 1 / K
        assert result["rankings"]["kendall_tau"][0] == 0
