"""Objectives on pairs: functions of (chosen, rejected), taken to rankings by `pairs.on_pairs`.

Throughout, s_w and s_l are the log-ratios log π/ρ of the chosen and the rejected response, |y| a response's
tokens, δ = β (s_w − s_l), and σ the logistic function. The gradient weight is −∂L/∂δ where the loss is a
function of δ.
"""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo.losses.bradley_terry import bradley_terry, negative_log_sigmoid
from dpo.losses.pairs import Pairs, Side, on_all_pairs_at_once, on_pairs
from dpo.losses.parameters import FlipProbability, NonNegative, Range, Strength
from dpo.losses.scores import Objective, Scores

_OF_REWARDS = frozenset({"divergence", "ld_alpha", "wpo"})

_LARGEST_MEAN_LOG_PROB = -1e-6
"""ORPO's odds p/(1 − p) stay finite."""


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


def simpo(
    beta: Strength = 2.0,
    gamma: NonNegative = 1.0,
    label_smoothing: FlipProbability = 0.0,
    pairs: Pairs = "all",
) -> Objective:
    """SimPO: the average log-probability is the reward, with a margin and no reference.

    Formula: −(1 − ε) log σ(m) − ε log σ(−m), m = β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ
    Gradient weight: σ(−m) − ε
    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6
    Defaults: β = 2, γ = 1 (the paper's for Llama-3-Base, Table 8; it advises β 2 to 2.5, γ 0.5 to 1.5)
    Data: pairs or rankings; no reference
    Reported: above DPO by up to 6.4 points on AlpacaEval 2 and 7.5 on Arena-Hard, tuned; high learning rates
        cost GSM8K and MMLU (the paper's appendix)
    Use: when memory or time for a reference is missing, or length bias is the problem
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        margin = beta * (chosen.mean_log_prob - rejected.mean_log_prob) - gamma
        return bradley_terry(margin, label_smoothing=label_smoothing)

    return Objective(on_pairs(loss, pairs), reference_free=True, admits=frozenset({"wpo"}))


def cpo(
    beta: Strength = 0.1,
    nll_weight: NonNegative = 1.0,
    label_smoothing: FlipProbability = 0.0,
    pairs: Pairs = "all",
) -> Objective:
    """Contrastive preference optimisation: DPO with a uniform reference, and likelihood of the chosen
    response.

    Formula: −(1 − ε) log σ(u) − ε log σ(−u) − λ log π(y_w)/|y_w|, u = β (log π(y_w) − log π(y_l))
    Gradient weight: σ(−u) − ε
    Source: Xu et al. 2024, arXiv:2401.08417; the likelihood is per token here, as in TRL's CPOTrainer (which
        averages over the batch's tokens; ours is per response, so no batch split changes it)
    Defaults: β = 0.1, λ = 1 (TRL's)
    Data: pairs or rankings; no reference
    Reported: ALMA-R matches or exceeds the WMT winners and GPT-4 in translation (WMT'21, '22, '23)
    Use: translation-like tasks with good chosen responses
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        preference = bradley_terry(beta * (chosen.policy - rejected.policy), label_smoothing=label_smoothing)
        return preference - nll_weight * chosen.mean_log_prob

    return Objective(on_pairs(loss, pairs), reference_free=True, admits=frozenset({"wpo"}))


def orpo(beta: Strength = 0.1, nll_weight: NonNegative = 1.0, pairs: Pairs = "all") -> Objective:
    """ORPO: likelihood of the chosen response plus the log odds ratio of the per-token probabilities.

    Formula: −w log p_w − β log σ(log[p_w/(1 − p_w)] − log[p_l/(1 − p_l)]), p = π(y)^(1/|y|)
    Gradient weight: β σ(−log odds ratio) / (1 − p) in each log p
    Source: Hong et al. 2024, arXiv:2403.07691, Eq. 3, 4, 6 and 7 (β is the paper's λ)
    Defaults: β = 0.1 (the paper's for Mistral 7B; 0.2 for Llama-2 7B, 0.25 for Phi-2), w = 1 (the paper's)
    Data: pairs or rankings; no reference
    Reported: fine-tuning and preference learning in one stage, from a base model: Mistral 7B reaches 12.2% on
        AlpacaEval 2
    Use: instead of SFT followed by DPO
    """

    def log_odds(side: Side) -> Float[Array, "P M"]:
        log_prob = jnp.minimum(side.mean_log_prob, _LARGEST_MEAN_LOG_PROB)
        # log(1 − e^x): expm1 is exact near 0, log1p far from it.
        near = jnp.log(-jnp.expm1(jnp.maximum(log_prob, -1.0)))
        far = jnp.log1p(-jnp.exp(jnp.minimum(log_prob, -0.5)))
        return log_prob - jnp.where(log_prob > -0.7, near, far)

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        ratio = negative_log_sigmoid(log_odds(chosen) - log_odds(rejected))
        return beta * ratio - nll_weight * chosen.mean_log_prob

    return Objective(on_pairs(loss, pairs), reference_free=True, admits=frozenset({"wpo"}))


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
    log_right, log_wrong = jnp.log1p(-label_smoothing), jnp.log(label_smoothing)

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
    Gradient weight: σ of minus the argument; times (1 + λ) on s_w while s_w < 0
    Source: Pal et al. 2024, arXiv:2402.13228
    Defaults: β = 0.3, λ = 50 (the paper's main setting)
    Data: pairs or rankings
    Reported: prevents the fall of the chosen likelihood, above all where the two responses differ little;
        Smaug-72B was the first open model above 80% on average on the Open LLM Leaderboard
    Use: maths and other data where the two responses differ in a few tokens
    """

    def loss(chosen: Side, rejected: Side) -> Float[Array, "P M"]:
        fallen = jax.nn.relu(-chosen.log_ratio)
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

    Formula: −log σ(δ − α f(score_w − score_l)), f the logarithm or the identity
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


def aot(beta: Strength = 0.1, label_smoothing: FlipProbability = 0.0, pairs: Pairs = "all") -> Objective:
    """AOT: the sorted policy gaps of the batch should dominate the sorted reference gaps.

    Formula: −(1 − ε) log σ(d) − ε log σ(−d), d_i = β (i-th smallest of log π(y_w)/π(y_l) − i-th smallest of
        log ρ(y_w)/ρ(y_l))
    Gradient weight: σ(−d) − ε
    Source: Melnyk et al. 2024, arXiv:2406.05882, §3, paired form
    Defaults: β = 0.1 (as DPO's); ε = 0 (TRL's)
    Data: pairs or rankings; statistics of the whole batch
    Reported: state of the art among 7B models on the Open LLM benchmarks and AlpacaEval, when it appeared
    Use: large batches
    """

    def loss(chosen: Side, rejected: Side, exists: Bool[Array, "P M"]) -> Float[Array, "P M"]:
        gap = chosen.policy - rejected.policy
        reference_gap = chosen.reference - rejected.reference
        return bradley_terry(
            beta * _minus_same_rank(gap, reference_gap, exists), label_smoothing=label_smoothing
        )

    return Objective(on_all_pairs_at_once(loss, pairs), whole_batch=True, admits=frozenset({"ld_alpha"}))


def aot_unpaired(
    beta: Strength = 0.1, label_smoothing: FlipProbability = 0.0, pairs: Pairs = "all"
) -> Objective:
    """AOT on unpaired responses: the sorted chosen log-ratios should dominate the sorted rejected ones.

    Formula: −(1 − ε) log σ(d) − ε log σ(−d), d_i = β (i-th smallest s_w − i-th smallest s_l)
    Gradient weight: σ(−d) − ε
    Source: Melnyk et al. 2024, arXiv:2406.05882, §3, unpaired form
    Defaults: β = 0.1 (as DPO's); ε = 0 (TRL's)
    Data: pairs or rankings; statistics of the whole batch
    Reported: as aot
    Use: large batches in which chosen and rejected are not answers to the same prompts
    """

    def loss(chosen: Side, rejected: Side, exists: Bool[Array, "P M"]) -> Float[Array, "P M"]:
        gap = _minus_same_rank(chosen.log_ratio, rejected.log_ratio, exists)
        return bradley_terry(beta * gap, label_smoothing=label_smoothing)

    return Objective(on_all_pairs_at_once(loss, pairs), whole_batch=True, admits=frozenset({"ld_alpha"}))


def sft() -> Objective:
    """Likelihood of the best response, averaged over the batch's tokens: a term for sums (DPO + NLL, MPO).

    Formula: −Σ log π(y_best) / Σ |y_best|, both sums over the whole batch
    Gradient weight: 1 on every token of the best response
    Source: TRL's sft term; Pang et al. 2024, arXiv:2404.19733 (DPO + NLL); Wang et al. 2024,
        arXiv:2411.10442, §3.2 (MPO)
    Defaults: none
    Data: anything with a best response; statistics of the whole batch; no reference
    Reported: crucial for iterated DPO on reasoning (Pang et al.)
    Use: `objectives: [{name: dpo, weight: 0.8}, {name: bco_pair, weight: 0.2}, {name: sft, weight: 1.0}]` is
        MPO
    """

    def loss(scores: Scores) -> Float[Array, " P"]:
        best = scores.present & (scores.ranks == 0)
        tokens = jnp.maximum(jnp.sum(jnp.where(best, scores.lengths, 0)), 1)
        mean = -jnp.sum(jnp.where(best, scores.policy, 0.0)) / tokens
        return jnp.broadcast_to(mean, scores.policy.shape[:1])

    return Objective(loss, whole_batch=True, reference_free=True)


def _minus_same_rank(
    values: Float[Array, "P M"], others: Float[Array, "P M"], exists: Bool[Array, "P M"]
) -> Float[Array, "P M"]:
    """Each value minus the one of `others` that has the same rank in sorted order, over the batch's pairs.

    The result stays with the pair whose value it is, so that a prompt keeps its own loss.
    """
    last = jnp.where(exists, 0.0, jnp.inf).ravel()
    order = jnp.argsort(values.ravel() + last, stable=True)
    rank = jnp.argsort(order, stable=True)
    matched = others.ravel()[jnp.argsort(others.ravel() + last, stable=True)][rank]
    return values - jnp.where(exists.ravel(), matched, 0.0).reshape(values.shape)
