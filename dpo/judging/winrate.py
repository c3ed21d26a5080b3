"""From verdicts in both orders to a win-rate that can be believed: pure functions, no files and no models.

A pair counts 1 when the policy wins in both orders, 0 when it loses in both, and ½ otherwise: a verdict that
changes with the order says nothing about the responses. A pair without a valid verdict in both orders has no
outcome; it is counted apart, and the win-rate is also given for the cases that all of these were lost or won.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from dpo.evaluation.statistics import (
    bounded_mean,
    few_clusters,
    is_without_spread,
    num_needed,
    sign_test,
    without_spread,
)
from dpo.intervals import wilson
from dpo.judging.figures import (
    ControlledFigures,
    CutFigures,
    JudgeFigures,
    Usage,
    WinrateFigures,
)
from dpo.judging.judges import Choice
from dpo.judging.length_control import length_controlled
from dpo.outcomes import UserError

POLICY_FIRST = {"first": 1.0, "tie": 0.5, "second": 0.0}


class Judged(NamedTuple):
    """One pair of responses with its two verdicts."""

    prompt: str
    """Identity of the prompt: pairs of one prompt are one cluster."""
    policy: str
    opponent: str
    policy_first: Choice | None
    """The verdict when the policy's response stood first; None is invalid."""
    opponent_first: Choice | None
    is_identical: bool = False
    """Both responses are the same text: a tie that no judge was asked about."""


class Votes(NamedTuple):
    """Both verdicts of n pairs, each as 1 for the policy, ½ for a tie, 0 for the opponent, NaN if invalid."""

    policy_first: Float[np.ndarray, " n"]
    opponent_first: Float[np.ndarray, " n"]

    @property
    def outcome(self) -> Float[np.ndarray, " n"]:
        """What a pair counts: the verdict where both orders agree, ½ where not, NaN without two verdicts."""
        agreed = np.where(self.policy_first == self.opponent_first, self.policy_first, 0.5)
        return np.where(np.isnan(self.policy_first + self.opponent_first), np.nan, agreed)

    @property
    def flipped(self) -> Shaped[np.ndarray, " n"]:
        """Pairs whose two valid verdicts differ."""
        return (self.policy_first != self.opponent_first) & ~np.isnan(self.policy_first + self.opponent_first)


def read_votes(pairs: Sequence[Judged]) -> Votes:
    """Verdicts about positions as verdicts about players."""
    nothing = float("nan")
    ours = [nothing if p.policy_first is None else POLICY_FIRST[p.policy_first] for p in pairs]
    theirs = [nothing if p.opponent_first is None else 1 - POLICY_FIRST[p.opponent_first] for p in pairs]
    return Votes(np.array(ours, np.float64), np.array(theirs, np.float64))


def describe_pairs(pairs: Sequence[Judged], *, seed: int = 0) -> WinrateFigures:
    """All figures as plain numbers for a JSON file; the interval of a figure is [estimate, low, high].

    Raises:
      ValueError: when no pair has a valid verdict in both orders.
    """
    votes = read_votes(pairs)
    outcome = votes.outcome
    valid = ~np.isnan(outcome)
    if not valid.any():
        raise UserError(f"none of {len(pairs)} pairs has a valid verdict in both orders")
    prompts = np.array([pair.prompt for pair in pairs])
    values, clusters = outcome[valid], prompts[valid]
    per_prompt = _mean_by(values, clusters)
    lengths = np.array([[len(pair.policy), len(pair.opponent)] for pair in pairs], np.float64)
    result: WinrateFigures = {
        "pairs": len(pairs),
        "prompts": len(np.unique(prompts)),
        "wins": int((values == 1).sum()),
        "ties": int((values == 0.5).sum()),
        "losses": int((values == 0).sum()),
        "ties_flipped": int(votes.flipped.sum()),
        "ties_identical": sum(pair.is_identical for pair in pairs),
        "invalid": int((~valid).sum()),
        "win_rate": list(bounded_mean(values, clusters, seed=seed)),
        "win_rate_if_invalid": [float(np.where(valid, outcome, lost).mean()) for lost in (0.0, 1.0)],
        "sign_test": sign_test(int((per_prompt > 0.5).sum()), int((per_prompt < 0.5).sum())),
        "prompts_needed": _prompts_needed(float(values.mean())),
        "length_controlled": _length_controlled(values, lengths[valid], clusters, seed),
        "mean_length": {"policy": float(lengths[:, 0].mean()), "opponent": float(lengths[:, 1].mean())},
        "judge": describe_judge(pairs, votes),
    }
    if len(per_prompt) == len(values):  # one pair a prompt: independent outcomes
        result["win_rate_wilson"] = list(wilson(float(values.sum()), len(values)))
    return result


def describe_judge(pairs: Sequence[Judged], votes: Votes) -> JudgeFigures:
    """How far the judge decides by position or by length; None where it had no chance to show it.

    `says_first` is the part of its decisions (ties apart) for the response that stood first: ½ for a judge
    without a position bias. `agrees_with_longer` is the part of the pairs of different length, won or lost,
    in which the longer response won.
    """
    asked = np.array([not pair.is_identical for pair in pairs])
    first = np.concatenate([votes.policy_first[asked], 1 - votes.opponent_first[asked]])
    decided = first[(first == 0) | (first == 1)]
    judged = asked & ~np.isnan(votes.outcome)
    longer = np.sign([len(pair.policy) - len(pair.opponent) for pair in pairs])
    won = votes.outcome * 2 - 1
    clear = judged & (longer != 0) & (won != 0)
    return {
        "says_first": _mean(decided),
        "flips": _mean(votes.flipped[judged].astype(np.float64)),
        "agrees_with_longer": _mean((won[clear] == longer[clear]).astype(np.float64)),
    }


MOST_CUT = 0.05
"""Part of a side's responses: where more were cut off, the win-rate is of halves of answers."""


def warnings_of(figures: WinrateFigures) -> list[str]:
    """What a reader of the win-rate has to know first."""
    found, judge = few_clusters(figures["prompts"]), figures["judge"]
    found += without_spread("win-rate", figures["win_rate"], figures["prompts"])
    if "cut" in figures:
        found += cut_warnings(figures["cut"])
    if figures["invalid"]:
        low, high = figures["win_rate_if_invalid"]
        found.append(
            f"{figures['invalid']} of {figures['pairs']} pairs lack a valid verdict in both orders; with all "
            f"of them lost or won the win-rate is {low:z.3f} or {high:z.3f}"
        )
    if judge["flips"] is not None and judge["flips"] > 0.3:
        by_position = judge["says_first"] is not None and abs(judge["says_first"] - 0.5) > 0.1
        found.append(
            f"the judge's verdict changes with the order in {judge['flips']:.0%} of the pairs (it says "
            f"'first' in {_percent(judge['says_first'])} of its decisions): "
            + ("it decides by position" if by_position else "it is not sure of its verdicts")
        )
    if judge["agrees_with_longer"] is not None and judge["agrees_with_longer"] > 0.9:
        found.append(
            f"the longer response wins {judge['agrees_with_longer']:.0%} of the decided pairs: read the "
            "length-controlled figure"
        )
    controlled = figures["length_controlled"]
    if controlled is not None and not 0.05 <= controlled["policy_longer"] <= 0.95:
        found.append(
            f"the policy's response is the longer in {controlled['policy_longer']:.0%} of the pairs: the "
            "length-controlled figure extrapolates"
        )
    return found


def cut_warnings(cut: CutFigures) -> list[str]:
    """Of each side of whose responses more than `MOST_CUT` were cut off."""
    kept = "left out" if cut["pairs_left_out"] else "judged so (leave_out_cut leaves them out)"
    return [
        f"{share:.0%} of the {side}'s responses were cut off at {cut['at']} tokens and {kept}: a larger "
        "max_new_tokens lets them end"
        for side, share in (("policy", cut["policy"]), ("opponent", cut["opponent"]))
        if share is not None and share > MOST_CUT
    ]


def figures_as_text(figures: WinrateFigures) -> str:
    """The figures of one temperature in a few lines."""
    lines = [
        _line(
            "win-rate",
            figures["win_rate"],
            "Wilson over prompts"
            if is_without_spread(figures["win_rate"], figures["prompts"])
            else "bootstrap over prompts",
        ),
        *([_line("", figures["win_rate_wilson"], "Wilson")] if "win_rate_wilson" in figures else []),
    ]
    if "cut" in figures:
        lines.append(f"{'cut off':<22}{cut_as_text(figures['cut'])}")
    controlled = figures["length_controlled"]
    if controlled is not None:
        lines.append(_line("length-controlled", controlled["win_rate"]))
    lengths = figures["mean_length"]
    lines += [
        f"{'wins, ties, losses':<22}{figures['wins']}, {figures['ties']}, {figures['losses']}"
        f"  ({figures['ties_flipped']} ties flip with the order, {figures['ties_identical']} are the same "
        f"text; {figures['invalid']} invalid)",
        f"{'sign test':<22}p = {figures['sign_test']:.2g}"
        + (
            ""
            if figures["prompts_needed"] is None
            else f"  ({figures['prompts_needed']} prompts show such a difference with 80% power)"
        ),
        f"{'mean length':<22}policy {lengths['policy']:z.0f}, opponent {lengths['opponent']:z.0f} characters",
    ]
    for group in (figures.get("reward", {}), figures.get("log_ratio", {})):
        lines += [_line(key, value) for key, value in group.items()]
    return "\n".join([*lines, *(f"! {text}" for text in warnings_of(figures))])


def cut_as_text(cut: CutFigures) -> str:
    """Which part of each side's responses did not come to an end."""
    sides = [f"{cut[side]:.1%} of the {side}'s" for side in ("policy", "opponent") if cut[side] is not None]
    left_out = f"; {cut['pairs_left_out']} pairs left out" if cut["pairs_left_out"] else ""
    return f"{', '.join(sides)} responses, at {cut['at']} tokens{left_out}"


def usage_as_text(usage: Usage) -> str:
    """What an endpoint's answers took, in a line."""
    text = (
        f"{usage['answers']} answers, {usage['from_cache']} of them from the cache; "
        f"{usage['prompt_tokens']} prompt and {usage['completion_tokens']} completion tokens, "
        f"cost {usage['cost']:.4g}"
    )
    if usage["unreported"]:
        text += f"\n! {usage['unreported']} answers came without a count of tokens, which the cost lacks"
    return text


def _line(name: str, interval: Sequence[float], note: str = "") -> str:
    estimate, low, high = interval
    return f"{name:<22}{estimate:z.3f}  95% {low:z.3f} to {high:z.3f}" + (f"  ({note})" if note else "")


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def _mean(values: Float[np.ndarray, " n"]) -> float | None:
    return float(values.mean()) if len(values) else None


def _mean_by(values: Float[np.ndarray, " n"], clusters: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, " c"]:
    _, cluster = np.unique(clusters, return_inverse=True)
    return np.bincount(cluster, weights=values) / np.bincount(cluster)


def _prompts_needed(rate: float) -> int | None:
    """None for a rate of exactly one half, which no number of prompts tells from one half."""
    return None if rate == 0.5 else num_needed(rate)


def _length_controlled(
    values: Float[np.ndarray, " n"],
    lengths: Float[np.ndarray, "n 2"],
    clusters: Shaped[np.ndarray, " n"],
    seed: int,
) -> ControlledFigures | None:
    fitted = length_controlled(values, lengths[:, 0] - lengths[:, 1], clusters, seed=seed)
    if fitted is None:
        return None
    return {
        "win_rate": list(fitted.win_rate),
        "quality": fitted.quality,
        "length": fitted.length,
        "policy_longer": fitted.longer,
    }
