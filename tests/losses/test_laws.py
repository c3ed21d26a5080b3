"""Laws that every objective obeys. A new entry of OBJECTIVES is tested the day it is added.

All tests evaluate at one shape (4 prompts, up to 4 responses), so that each objective is compiled once a
dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from score_cases import evaluate, random_scores

from dpo.losses import MISMATCHED, OBJECTIVES, Scores, make_objective
from dpo.losses.objectives import MODIFIERS, PAIRWISE, UNPAIRED
from dpo.losses.parameters import parameters_of

# Non-default settings under which the laws are tested too.
VARIANTS = [
    {"name": "dpo", "label_smoothing": 0.1},
    {"name": "dpo", "pairs": "adjacent"},
    {"name": "dpo", "pairs": "best_worst"},
    {"name": "dpo", "divergence": "forward_kl"},
    {"name": "dpo", "divergence": "jensen_shannon"},
    {"name": "dpo", "divergence": 0.5},
    {"name": "dpo", "ld_alpha": 0.3},
    {"name": "dpo", "wpo": True},
    {"name": "plackett_luce", "top_k": 2},
    {"name": "plackett_luce", "discount": 0.7},
    {"name": "listmle", "weights": "dcg"},
    {"name": "lipo_lambda", "gains": "scores"},
    {"name": "odpo", "scaling": "identity"},
    {"name": "kto", "baseline": "batch", "undesirable_weight": 1.5},
    {"name": "kto", "baseline": "none"},
    {"name": "bco", "shift": "batch", "desirable_weight": 0.5},
]
SPECS = [{"name": name} for name in OBJECTIVES] + VARIANTS

# The exceptions, each with its reason.
READS_ABSOLUTE_REWARDS = {
    *(
        "nca",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "dpop",
        "cal_dpo",
    ),  # pin each reward to a value
    *("ipo_norm", "dpo_norm", "simpo", "cpo", "orpo", "sft"),  # divide by lengths, or are likelihoods
    *UNPAIRED,  # no second response to compare with
}
NOT_MONOTONE = {
    *("ipo", "ipo_norm", "sppo_hard", "cal_dpo", "reward_distillation"),  # regressions onto a finite value
    *("discopop", "exo", "nca"),  # a dip; forgives badly wrong pairs; the rejected reward is noise, too
    *("robust", "sft"),  # finite optimum under assumed noise; does not read the rejected response
}


def _label(spec: dict) -> str:
    return "-".join(str(x) for x in spec.values())


def _for(condition):
    specs = [spec for spec in SPECS if condition(spec, make_objective(spec))]
    return pytest.mark.parametrize("spec", specs, ids=map(_label, specs))


def _reads_only_the_gap(spec, objective) -> bool:
    modified = {"divergence", "ld_alpha", "wpo"} & spec.keys()  # they read the two sides one by one
    return spec["name"] not in READS_ABSOLUTE_REWARDS and not modified and not objective.whole_batch


every = _for(lambda spec, objective: True)


def _scores(spec: dict, seed: int = 0, **more) -> Scores:
    """4 × 4, ragged; where KTO's baseline is measured, the last response answers another prompt."""
    present = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    scores = random_scores(seed, P=4, K=4, present=present, **more)
    if "mismatched" in make_objective(spec).needs:
        return scores._replace(ranks=scores.ranks.at[:, 3].set(MISMATCHED))
    return scores


def _only(scores: Scores, prompt: int) -> Scores:
    """The same arrays with every other prompt absent."""
    return scores._replace(present=scores.present & (jnp.arange(4) == prompt)[:, None])


@every
def test_gradient_is_finite_differences(spec):
    """Of the loss with its constants held: WPO's weights, KTO's and BCO's baselines."""
    with jax.enable_x64(True):
        scores = _scores(spec)
        slope = evaluate(spec, scores)[1]
        held_spec, held = _hold_constants(spec, scores)
        numeric = np.zeros((4, 4))
        for index in np.ndindex(4, 4):
            losses = [
                evaluate(held_spec, held._replace(policy=held.policy.at[index].add(sign * 1e-5)))[0].sum()
                for sign in (1, -1)
            ]
            numeric[index] = (losses[0] - losses[1]) / 2e-5
        np.testing.assert_allclose(slope, numeric, rtol=1e-5, atol=1e-7)


def _hold_constants(spec: dict, scores: Scores) -> tuple[dict, Scores]:
    """An objective and scores with the same value, in which what is not differentiated does not move."""
    if spec.get("wpo"):
        assert scores.log_collision is not None
        weights = jnp.exp((scores.policy - scores.log_collision) / scores.lengths)
        return {"name": spec["name"]}, scores._replace(weights=weights)
    if spec["name"] not in UNPAIRED or not make_objective(spec).whole_batch:
        return spec, scores
    mismatched = scores.ranks == MISMATCHED
    counted = scores.present & (mismatched if mismatched.any() else True)
    mean = jnp.sum(jnp.where(counted, scores.log_ratio, 0.0)) / jnp.sum(counted)
    if spec["name"] == "bco":
        return {**spec, "shift": "running"}, scores._replace(shift=mean)
    return {**spec, "baseline": "none"}, scores._replace(reference=scores.reference + jnp.maximum(mean, 0.0))


@_for(_reads_only_the_gap)
def test_log_partition_cancels(spec):
    """Adding f(x) to all implicit rewards of a prompt changes nothing, so gradients sum to zero over them."""
    with jax.enable_x64(True):
        scores = _scores(spec, seed=1)
        losses, slope = evaluate(spec, scores)
        shift = jnp.array([[7.0], [-3.0], [0.5], [0.0]])
        moved, _ = evaluate(spec, scores._replace(policy=scores.policy + shift))
        np.testing.assert_allclose(moved, losses, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(slope.sum(axis=1), 0.0, atol=1e-9)


@_for(lambda spec, objective: spec["name"] in PAIRWISE and _reads_only_the_gap(spec, objective))
def test_swapping_two_responses_is_negating_the_gap(spec):
    """L(a ≻ b) = ℓ(δ), so with the names exchanged it is ℓ(−δ): the same as exchanging the log-ratios."""
    with jax.enable_x64(True):
        scores = _scores(spec, seed=2)
        pairs = scores._replace(
            present=jnp.zeros((4, 4), bool).at[:, :2].set(True),
            lengths=jnp.full((4, 4), 5),
            scores=jnp.zeros((4, 4)),
            reference=jnp.zeros((4, 4)),
        )
        gap = pairs.policy[:, 0] - pairs.policy[:, 1]
        negated = pairs._replace(policy=jnp.zeros((4, 4)).at[:, 1].set(gap))
        flipped = pairs._replace(policy=pairs.policy[:, jnp.array([1, 0, 2, 3])])
        np.testing.assert_allclose(evaluate(spec, negated)[0], evaluate(spec, flipped)[0], rtol=1e-9)
        slope = evaluate(spec, flipped)[1]
        np.testing.assert_allclose(slope[:, 0], -slope[:, 1], atol=1e-12)


@_for(
    lambda spec, _: (
        spec["name"] in PAIRWISE
        and spec["name"] not in NOT_MONOTONE
        and not {"label_smoothing", "ld_alpha", "wpo"} & spec.keys()
    )
)
def test_a_worse_rejected_response_never_costs(spec):
    """The loss does not rise while the rejected log-prob falls and all else stays."""
    with jax.enable_x64(True):
        scores = _scores(spec, seed=3)
        scores = scores._replace(present=jnp.zeros((4, 4), bool).at[0, :2].set(True))
        losses = [
            evaluate(spec, scores._replace(policy=scores.policy.at[0, 1].add(-fall)))[0][0]
            for fall in np.linspace(-8.0, 8.0, 17)
        ]
        assert np.all(np.diff(losses) <= 1e-12)


@every
def test_prompts_can_be_permuted(spec):
    with jax.enable_x64(True):
        scores = _scores(spec, seed=4)
        order = np.array([2, 0, 3, 1])
        moved = jax.tree.map(lambda x: x[order] if x.ndim else x, scores)
        np.testing.assert_allclose(evaluate(spec, moved)[0], evaluate(spec, scores)[0][order], rtol=1e-9)


@every
def test_what_absent_responses_hold_is_never_read(spec):
    """Padding along K, and a prompt that is all padding: no value, and no gradient."""
    with jax.enable_x64(True):
        scores = _scores(spec, seed=5)
        scores = scores._replace(present=scores.present.at[3].set(False))
        absent = ~scores.present

        def refill(x, filler):
            return jnp.where(absent, jnp.asarray(filler, x.dtype), x) if x.ndim else x

        refilled = jax.tree.map(lambda x: refill(x, 13), scores._replace(present=jnp.ones((4, 4), bool)))
        refilled = refilled._replace(present=scores.present, scores=refill(scores.scores, np.nan))
        (losses, slope), (other, _) = evaluate(spec, scores), evaluate(spec, refilled)
        assert np.all(np.isfinite(losses))
        np.testing.assert_allclose(other, losses, rtol=1e-12)
        assert np.all(slope[np.asarray(absent)] == 0.0)


@every
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_log_probs_are_finite_in_float32(spec, size):
    rows = [[size, -size, 0, size], [0, size, -size, 0], [-1e-7] * 4, [size] * 4]
    policy = jnp.asarray(rows, jnp.float32)
    if make_objective(spec).reference_free:
        policy = jnp.minimum(policy, 0.0)  # log-probs themselves
    scores = _scores(spec)._replace(policy=policy, reference=jnp.zeros((4, 4)))
    scores = scores._replace(
        policy_head=policy,
        reference_head=scores.reference,
        log_collision=policy,
        present=jnp.ones((4, 4), bool),
    )
    losses, slope = evaluate(spec, scores)
    assert np.all(np.isfinite(losses))
    assert np.all(np.isfinite(slope))


@every
def test_float32_agrees_with_float64(spec):
    with jax.enable_x64(True):
        wide = _scores(spec, seed=6)
        expected, expected_slope = evaluate(spec, wide)
        narrow = jax.tree.map(np.asarray, wide)
    narrow = jax.tree.map(jnp.asarray, narrow)  # float32 outside of the context
    losses, slope = evaluate(spec, narrow)
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=5e-4, atol=1e-4)


@every
def test_only_declared_fields_are_read(spec):
    """`needs` and `reference_free` say truly what the loss depends on: the rest may be NaN."""
    objective = make_objective(spec)
    scores = _scores(spec, seed=7)
    fields = {
        "log_collision": ["log_collision"],
        "head": ["policy_head", "reference_head"],
        "shift": ["shift"],
        "scores": ["scores"],
    }
    unread = [name for need, names in fields.items() if need not in objective.needs for name in names]
    blank = {name: jnp.full_like(getattr(scores, name), jnp.nan) for name in unread}
    losses, _ = evaluate(spec, scores)
    np.testing.assert_array_equal(evaluate(spec, scores._replace(**blank))[0], losses)
    assert scores.reference_head is not None
    moved = scores._replace(
        reference=scores.reference * 1.3 - 1.0, reference_head=scores.reference_head * 1.3 - 1.0
    )
    assert np.array_equal(evaluate(spec, moved)[0], losses) == objective.reference_free


@every
def test_whole_batch_says_whether_other_prompts_matter(spec):
    scores = _scores(spec, seed=8)
    scores = scores._replace(policy=scores.policy + 2.0)
    alone = [evaluate(spec, _only(scores, prompt))[0][prompt] for prompt in range(4)]
    together, _ = evaluate(spec, scores)
    assert np.allclose(alone, together, rtol=1e-5) != make_objective(spec).whole_batch


@every
def test_expected_initial_loss_is_the_loss_of_the_reference(spec):
    scores = _scores(spec, seed=9)
    objective = make_objective(spec)
    expected = jax.eval_shape(objective.expected_initial_loss, scores)
    assert (expected is None) == objective.reference_free


@every
def test_rounding_decides_nothing_where_all_rewards_are_equal(spec):
    """As they are at the start: neither the loss nor the gradient of the batch jumps there."""
    scores = _scores(spec, seed=10)
    at_start = scores._replace(policy=scores.reference, policy_head=scores.reference_head)
    exact, exact_slope = evaluate(spec, at_start)
    for seed in range(3):
        noise = 3e-5 * np.random.default_rng(seed).normal(size=scores.policy.shape).astype(exact.dtype)
        rounded, slope = evaluate(spec, at_start._replace(policy=at_start.policy + noise))
        np.testing.assert_allclose(rounded, exact, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(slope, exact_slope, rtol=2e-3, atol=2e-3)


@every
def test_something_is_learned_where_all_rewards_are_equal(spec):
    """Every prompt that has responses to compare pulls at them."""
    scores = _scores(spec, seed=11)
    _, slope = evaluate(spec, scores._replace(policy=scores.reference, policy_head=scores.reference_head))
    assert np.all(np.abs(slope).sum(axis=1) > 0)


@every
def test_a_prompt_with_one_response_teaches_where_the_objective_says_so(spec):
    """Of the others such rows are left out before they are tokens."""
    scores = _scores(spec, seed=3)
    alone = jnp.asarray([[True, False, False, False]] * 4)
    _, slope = evaluate(spec, scores._replace(present=alone, ranks=jnp.zeros_like(scores.ranks)))
    assert np.all(slope[:, 0] != 0) == make_objective(spec).learns_from_single_responses
    assert np.all(slope[:, 1:] == 0)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("key", MODIFIERS)
def test_modifiers_are_taken_where_they_are_admitted_and_refused_elsewhere(name, key):
    given = {"wpo": True, "ld_alpha": 0.5, "divergence": 0.5}[key]
    if key in make_objective({"name": name}).admits:
        assert make_objective({"name": name, key: given}) is not None
    else:
        with pytest.raises(ValueError, match=f"unknown hyper-parameter '{key}'"):
            make_objective({"name": name, key: given})


OTHER_VALUES = {
    **{"pairs": "best_worst", "scaling": "identity", "weights": "dcg", "gains": "scores"},
    **{
        "shift": "batch",
        "baseline": "batch",
        "top_k": 1,
        "label_smoothing": 0.2,
        "discount": 0.5,
        "tau": 0.5,
    },
}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, factory in OBJECTIVES.items() for key in parameters_of(factory)]
)
def test_every_hyper_parameter_has_an_effect(name, key):
    """No argument is accepted and then ignored."""
    scores = _scores({"name": name}, seed=10, spread=3.0)
    default, _ = evaluate({"name": name}, scores)
    changed, _ = evaluate({"name": name, key: OTHER_VALUES.get(key, 0.35)}, scores)
    assert not np.allclose(changed, default, rtol=1e-4)
