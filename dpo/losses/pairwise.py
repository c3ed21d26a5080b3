"""Objectives on pairs: functions of (chosen, rejected), taken to rankings by `pairs.on_pairs`.

Those without a reference are in `reference_free.py`, those of a whole batch in `whole_batch.py`.

Throughout, s_w and s_l are the log-ratios log π/ρ of the chosen and the rejected response, |y| a response's
tokens, δ = β (s_w − s_l), and σ the logistic function. The gradient weight is −∂L/∂δ where the loss is a
function of δ.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo.losses.bradley_terry import bradley_terry, negative_log_sigmoid
from dpo.losses.pairs import Pairs, Side, on_pairs
from dpo.losses.parameters import FlipProbability, NonNegative, Range, Strength
from dpo.losses.scores import TIE, Objective

_OF_REWARDS = frozenset({"divergence", "ld_alpha", "wpo"})


def dpo(beta: Strength = 0.1, label_smoothing: FlipProbability = 0.0, pairs: Pairs = "all") -> Objective:
    """Direct preference optimisation: the Bradley-Terry likelihood of the implicit rewards.

    Formula: −(1 − ε) log σ(δ) − ε log σ(−δ)
    Gradient weight: σ(−δ) − ε
    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; ε > 0: Mitchell 2023, "A note on DPO with noisy
        preferences" (conservative DPO), Eq. 3
    Defaults: β = 0.1 (the paper's, appendix B; 0.5 for its summarisation); ε = 0 (plain DPO)
    Data: pairs or rankings
    Reported: exceeds PPO in controlling sentiment, matches or exceeds it in summarisation and dialogue; the
        chosen response's likelihood can fall together with the rejected one's (Pal et al. 2024,
        arXiv:2402.13228)
    Use: the first thing to try; ε near the share of wrong labels when labels are noisy
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        return bradley_terry(beta * (chosen.log_ratio - rejected.log_ratio), label_smoothing=label_smoothing)

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def ipo(beta: Strength = 0.1, pairs: Pairs = "all") -> Objective:
    """IPO as in its paper: regress the log-ratio gap onto 1/(2β).

    Formula: (s_w − s_l − 1/(2β))²
    Gradient weight: (1/β − 2δ/β)/β, negative beyond δ = 1/2
    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17 (β is the paper's τ)
    Defaults: β = 0.1 (as DPO's)
    Data: pairs or rankings
    Reported: a finite gap at the optimum even for deterministic preferences, where DPO's grows without bound
        (§4.2 and §5; the paper's experiments are bandits, not language models)
    Use: few or near-deterministic labels, when DPO over-fits; the scale of the loss grows with length
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        return (chosen.log_ratio - rejected.log_ratio - 0.5 / beta) ** 2

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def ipo_norm(beta: Strength = 0.1, pairs: Pairs = "all") -> Objective:
    """IPO on per-token averages, as TRL computes it.

    Formula: (s_w/|y_w| − s_l/|y_l| − 1/(2β))²
    Gradient weight: (1/β − 2δ/β)/β at |y| = 1
    Source: TRL's `ipo`, which calls this form confirmed with IPO's authors; the paper (see ipo) does not
        mention lengths
    Defaults: β = 0.1 (TRL)
    Data: pairs or rankings
    Reported: TRL's code says that the paper's own results are of this form
    Use: to compare with TRL's ipo; when lengths vary much
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        gap = chosen.log_ratio / chosen.lengths - rejected.log_ratio / rejected.lengths
        return (gap - 0.5 / beta) ** 2

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def hinge(beta: Strength = 0.1, pairs: Pairs = "all") -> Objective:
    """SLiC's hinge on the implicit rewards: nothing to learn beyond margin 1.

    Formula: max(0, 1 − δ)
    Gradient weight: 1 where δ < 1, else 0
    Source: Zhao et al. 2023, arXiv:2305.10425, §2 (SLiC-HF); normalised by the reference as hinge-norm of Liu
        et al. 2023, arXiv:2309.06657 (RSO, whose γ is β)
    Defaults: β = 0.1 (as DPO's)
    Data: pairs or rankings
    Reported: slightly below DPO on all pairs of ranked lists (LiPO, arXiv:2402.01878, Table 1)
    Use: when pairs that are already right should be left alone
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        return jax.nn.relu(1.0 - beta * (chosen.log_ratio - rejected.log_ratio))

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def robust(beta: Strength = 0.1, label_smoothing: FlipProbability = 0.1, pairs: Pairs = "all") -> Objective:
    """rDPO: an unbiased estimate of the clean DPO loss from labels flipped with probability ε.

    Formula: [−(1 − ε) log σ(δ) + ε log σ(−δ)] / (1 − 2ε)
    Gradient weight: [(1 − ε) σ(−δ) + ε σ(δ)] / (1 − 2ε)
    Source: Chowdhury et al. 2024, arXiv:2403.00409, §3.1
    Defaults: β = 0.1 (as DPO's); ε = 0.1 (the paper's, §6)
    Data: pairs or rankings
    Reported: more robust to label noise than DPO and other heuristics (IMDb sentiment, Anthropic HH)
    Use: when the flip rate is known; unbounded below on a single pair, so watch single examples
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        delta = beta * (chosen.log_ratio - rejected.log_ratio)
        clean = (1.0 - label_smoothing) * negative_log_sigmoid(delta)
        return (clean - label_smoothing * negative_log_sigmoid(-delta)) / (1.0 - 2.0 * label_smoothing)

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def dpo_norm(beta: Strength = 5.0, pairs: Pairs = "all") -> Objective:
    """Length-normalised DPO: rewards per token.

    Formula: −log σ(β (s_w/|y_w| − s_l/|y_l|))
    Gradient weight: σ(−δ), δ of the per-token rewards
    Source: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124, Eq. 6
    Defaults: β = 5 (Tülu 3, Table 20)
    Data: pairs or rankings
    Reported: of DPO, this and SimPO the only one that improved on Tülu 3's starting checkpoint overall
    Use: when long responses win for being long
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        gap = chosen.log_ratio / chosen.lengths - rejected.log_ratio / rejected.lengths
        return negative_log_sigmoid(beta * gap)

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def exo(
    beta: Strength = 0.1,
    label_smoothing: Annotated[float, Range(low=0.0, high=0.5, open_low=True, open_high=True)] = 1e-3,
    pairs: Pairs = "all",
) -> Objective:
    """EXO on pairs: reverse KL from the policy's preference to the smoothed label, where DPO's is forward KL.

    Formula: q log(q/(1 − ε)) + (1 − q) log((1 − q)/ε), q = σ(δ)
    Gradient weight: σ(δ) σ(−δ) (log((1 − ε)/ε) − δ)
    Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16
    Defaults: β = 0.1 (the paper's β_r, appendix B); ε = 1e-3 (TRL's; it must be positive)
    Data: pairs or rankings
    Reported: by the paper's analysis it moves, asymptotically, as reinforcement learning does, and DPO seeks
        the mean instead
    Use: mode-seeking behaviour; badly wrong pairs get little gradient
    """
    log_right, log_wrong = math.log1p(-label_smoothing), math.log(label_smoothing)  # on no device

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        delta = beta * (chosen.log_ratio - rejected.log_ratio)
        right = jax.nn.sigmoid(delta) * (jax.nn.log_sigmoid(delta) - log_right)
        return right + jax.nn.sigmoid(-delta) * (jax.nn.log_sigmoid(-delta) - log_wrong)

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def nca(beta: Strength = 0.1, pairs: Pairs = "all") -> Objective:
    """NCA on pairs: noise contrast of each implicit reward against zero, so that the chosen one cannot fall.

    Formula: −log σ(βs_w) − ½ log σ(−βs_w) − ½ log σ(−βs_l)
    Gradient weight: σ(−βs_w) − ½ σ(βs_w) on the chosen reward, ½ σ(βs_l) on the rejected
    Source: Chen et al. 2024, arXiv:2402.05369, Table 1 and appendix B (the pairwise form)
    Defaults: β = 0.1 (as DPO's; the paper uses 0.01, appendix C)
    Data: pairs or rankings
    Reported: keeps the chosen likelihood from falling (§4.2)
    Use: when DPO lowers the chosen likelihood
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        better, worse = beta * chosen.log_ratio, beta * rejected.log_ratio
        noise = 0.5 * (negative_log_sigmoid(-better) + negative_log_sigmoid(-worse))
        return negative_log_sigmoid(better) + noise

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def bco_pair(beta: Strength = 0.1, pairs: Pairs = "all") -> Objective:
    """BCO without its shift: classify the chosen reward as positive and the rejected as negative.

    Formula: −log σ(βs_w) − log σ(−βs_l)
    Gradient weight: σ(−βs_w) on the chosen reward, σ(βs_l) on the rejected
    Source: Jung et al. 2024, arXiv:2404.04656, with shift 0 (TRL's bco_pair)
    Defaults: β = 0.1 (as DPO's; the paper uses 0.01, appendix C)
    Data: pairs or rankings
    Reported: an upper bound of the DPO loss (the paper's theorem)
    Use: as a term of a sum (MPO); alone prefer bco
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        return negative_log_sigmoid(beta * chosen.log_ratio) + negative_log_sigmoid(
            -beta * rejected.log_ratio
        )

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def sppo_hard(beta: Strength = 0.001, pairs: Pairs = "all") -> Objective:
    """SPPO with hard labels: each log-ratio is regressed onto ±1/(2β).

    Formula: (s_w − 1/(2β))² + (s_l + 1/(2β))²
    Gradient weight: 2 (1/(2β) − s_w) on s_w, 2 (1/(2β) + s_l) on s_l
    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 (Algorithm 1) with winning probabilities 1 and 0 (β is
        1/η)
    Defaults: β = 0.001 (the paper's η = 1e3)
    Data: pairs or rankings, best sampled from the current policy
    Reported: over iterations of sampling and training, above iterative DPO and IPO on MT-Bench, Arena-Hard
        and the Open LLM Leaderboard (with estimated, not hard, probabilities)
    Use: iterated, on-policy training
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        return (chosen.log_ratio - 0.5 / beta) ** 2 + (rejected.log_ratio + 0.5 / beta) ** 2

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def apo_zero(beta: Strength = 0.1, pairs: Pairs = "all") -> Objective:
    """APO-zero: the chosen response up, the rejected down, each against zero.

    Formula: 1 − σ(βs_w) + σ(βs_l)
    Gradient weight: σ′(βs_w) on the chosen reward, σ′(βs_l) on the rejected
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7
    Defaults: β = 0.1 (the paper's, §5.2)
    Data: pairs or rankings whose chosen responses are better than the policy's own
    Reported: with 32,000 contrastive revisions by a stronger model (CLAIR) APO improves Llama-3-8B-Instruct
        by 7.65%, closing 45% of the gap to GPT4-turbo
    Use: data from a stronger model
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        return jax.nn.sigmoid(-beta * chosen.log_ratio) + jax.nn.sigmoid(beta * rejected.log_ratio)

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def apo_down(beta: Strength = 0.1, pairs: Pairs = "all") -> Objective:
    """APO-down: the chosen response down, the rejected one further down.

    Formula: σ(βs_w) + 1 − σ(β (s_w − s_l))
    Gradient weight: σ′(δ) on δ, −σ′(βs_w) on the chosen reward
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8
    Defaults: β = 0.1 (the paper's, §5.2)
    Data: pairs or rankings whose chosen responses are worse than the policy's own
    Reported: the form for a policy that is already better than its data (the paper's §4)
    Use: a strong policy on weak data
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        delta = beta * (chosen.log_ratio - rejected.log_ratio)
        return jax.nn.sigmoid(beta * chosen.log_ratio) + jax.nn.sigmoid(-delta)

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def discopop(
    beta: Strength = 0.1,
    tau: Annotated[float, Range(low=0.0, high=1.0, open_low=True)] = 0.05,
    pairs: Pairs = "all",
) -> Objective:
    """DiscoPOP: a blend of logistic and exponential loss, found by a language model.

    Formula: (1 − σ(δ/τ)) · (−log σ(δ)) + σ(δ/τ) · exp(−δ)
    Gradient weight: not monotone: a local minimum of the loss for slightly negative δ
    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5
    Defaults: β = 0.1 (as DPO's; the paper uses 0.05); τ = 0.05 (the paper's, appendix E; above 1 the loss
        overflows for wrong pairs)
    Data: pairs or rankings
    Reported: above the other objectives that the paper compares, on sentiment, summarisation and AlpacaEval 2
    Use: as a candidate in a comparison
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        delta = beta * (chosen.log_ratio - rejected.log_ratio)
        logistic = jax.nn.sigmoid(-delta / tau) * negative_log_sigmoid(delta)
        # σ(δ/τ) exp(−δ) in one exponent, which stays below zero where exp(−δ) alone would overflow.
        return logistic + jnp.exp(-delta - jax.nn.softplus(-delta / tau))

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def dpop(beta: Strength = 0.3, penalty: NonNegative = 50.0, pairs: Pairs = "all") -> Objective:
    """DPO-positive: DPO with a penalty when the chosen response becomes less likely than under the reference.

    Formula: −log σ(β (s_w − s_l − λ max(0, −s_w)))
    Gradient weight: σ of minus the argument; times (1 + λ) on s_w while s_w < 0, by more than rounding
    Source: Pal et al. 2024, arXiv:2402.13228
    Defaults: β = 0.3, λ = 50 (the paper's main setting)
    Data: pairs or rankings
    Reported: prevents the fall of the chosen likelihood, above all where the two responses differ little;
        Smaug-72B was the first open model above 80% on average on the Open LLM Leaderboard
    Use: maths and other data where the two responses differ in a few tokens
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        fallen = jnp.where(chosen.log_ratio < -TIE, -chosen.log_ratio, 0.0)  # less is rounding
        return negative_log_sigmoid(beta * (chosen.log_ratio - rejected.log_ratio - penalty * fallen))

    return Objective(on_pairs(loss, pairs), admits=frozenset({"ld_alpha", "wpo"}))


def cal_dpo(beta: Strength = 0.1, pairs: Pairs = "all") -> Objective:
    """Cal-DPO: contrast the log-ratios and pin them to ±1/(2β).

    Formula: −log σ(s_w − s_l) + (s_w − 1/(2β))² + (s_l + 1/(2β))²
    Gradient weight: σ(−(s_w − s_l)), plus 2 (1/(2β) ∓ s) on each side
    Source: Xiao et al. 2024, arXiv:2412.14516
    Defaults: β = 0.1 (ours, to compare)
    Data: pairs or rankings
    Reported: keeps the chosen likelihood from falling; above DPO on reasoning, summarisation and dialogue in
        the paper
    Use: when the scale of the implicit reward should mean something
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        calibration = (chosen.log_ratio - 0.5 / beta) ** 2 + (rejected.log_ratio + 0.5 / beta) ** 2
        return negative_log_sigmoid(chosen.log_ratio - rejected.log_ratio) + calibration

    return Objective(on_pairs(loss, pairs), admits=frozenset({"ld_alpha", "wpo"}))


def r_dpo(beta: Strength = 0.1, alpha: NonNegative = 0.01, pairs: Pairs = "all") -> Objective:
    """Length-regularised DPO: the reward that is learned pays α a token.

    Formula: −log σ(δ + α (|y_w| − |y_l|))
    Gradient weight: σ of minus the argument: less for a pair that length explains
    Source: Park et al. 2024, arXiv:2403.19159: maximising r − α|y| puts β log π/ρ + α|y| in the place of r
        (some tables of later papers print the sign of α the other way)
    Defaults: β = 0.1; α = 0.01 (ours: a hundred tokens weigh as much as β times ten nats)
    Data: pairs or rankings
    Reported: up to 20% higher win-rates at controlled length, in summarisation and dialogue
    Use: when longer is chosen more often than not in the data
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        excess = chosen.lengths - rejected.lengths
        return negative_log_sigmoid(beta * (chosen.log_ratio - rejected.log_ratio) + alpha * excess)

    return Objective(on_pairs(loss, pairs), admits=_OF_REWARDS)


def odpo(
    beta: Strength = 0.1,
    alpha: NonNegative = 1.0,
    scaling: Literal["log", "identity"] = "log",
    pairs: Pairs = "all",
) -> Objective:
    """DPO with an offset: the margin grows with the difference of the given scores.

    Formula: −log σ(δ − α f(score_w − score_l)), f the logarithm (of 1e-6 at least) or the identity
    Gradient weight: σ(α f(score_w − score_l) − δ)
    Source: Amini et al. 2024, arXiv:2402.10571
    Defaults: β = 0.1 (as DPO's); α = 1 (the authors' code; 0.5 for its sentiment task), f = log
    Data: pairs or rankings with scores
    Reported: a better reward-KL frontier than DPO, most with few pairs
    Use: when scores come with the data
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        gain = chosen.scores - rejected.scores
        offset = jnp.log(jnp.maximum(gain, 1e-6)) if scaling == "log" else gain
        return negative_log_sigmoid(beta * (chosen.log_ratio - rejected.log_ratio) - alpha * offset)

    return Objective(on_pairs(loss, pairs), needs=frozenset({"scores"}), admits=_OF_REWARDS)


def reward_distillation(beta: Strength = 0.1, pairs: Pairs = "all") -> Objective:
    """Reward-model distillation: regress the implicit reward difference onto the given one.

    Formula: (δ − (score_w − score_l))²
    Gradient weight: 2 (score_w − score_l − δ)
    Source: Fisch et al. 2024, arXiv:2405.19316; the same regression as REBEL, arXiv:2404.16767
    Defaults: β = 0.1 (as DPO's)
    Data: pairs or rankings with scores in units of the reward
    Reported: more robust than DPO to a shift in the annotations where a family of reward models is distilled;
        this is the form with one
    Use: when a trusted reward model scored the data
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        delta = beta * (chosen.log_ratio - rejected.log_ratio)
        return (delta - (chosen.scores - rejected.scores)) ** 2

    return Objective(on_pairs(loss, pairs), needs=frozenset({"scores"}), admits=_OF_REWARDS)
