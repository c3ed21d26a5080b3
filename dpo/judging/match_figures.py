"""What a match compares, and its figures: by temperature, what was cut off, what a paid judge cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo.config import WinrateConfig
from dpo.evaluation.statistics import cluster_bootstrap
from dpo.judging.figures import (
    CutFigures,
    Usage,
    VerdictLine,
    WinrateFigures,
)
from dpo.judging.samples import Request, Sample
from dpo.judging.winrate import Judged, describe_pairs
from dpo.outcomes import UserError


class Pair(NamedTuple):
    """The two responses to one request."""

    request: Request
    policy: Sample
    opponent: str
    opponent_tokens: list[int] | None
    """The opponent's tokens of the prompt; None where the opponent is the data."""
    opponent_has_ended: bool | None
    """None where the opponent is the data."""

    @property
    def is_identical(self) -> bool:
        """Nothing to judge."""
        return self.policy.text == self.opponent

    @property
    def is_cut(self) -> bool:
        """Whether a side did not come to its end."""
        return not self.policy.has_ended or self.opponent_has_ended is False

    @property
    def temperature(self) -> float:
        """At which both sides were sampled."""
        return self.request.sampling.temperature


def describe_temperature(
    temperature: float,
    seed: int,
    pairs: Sequence[Pair],
    verdicts: Sequence[tuple[VerdictLine, VerdictLine]],
    ratios: np.ndarray | None,
    *,
    left_out: bool = False,
) -> WinrateFigures:
    """The win-rate at one temperature; where they are known, mean rewards and the policy's log-ratio.

    `left_out` says that the policy's samples at this temperature are not all here: the mean of the log-ratio
    then is no estimate of a KL.
    """
    mine = [i for i, pair in enumerate(pairs) if pair.temperature == temperature]
    if not mine:
        raise UserError(
            f"temperature {temperature:g}: in every pair a response was cut off, and leave_out_cut leaves "
            "them out; allowed: a larger max_new_tokens"
        )
    judged = [_as_judged(pairs[i], *verdicts[i]) for i in mine]
    if not any(pair.policy_first and pair.opponent_first for pair in judged):
        raise UserError(_nothing_valid(temperature, [verdicts[i] for i in mine]))
    result = describe_pairs(judged, seed=seed)
    prompts = np.array([pair.prompt for pair in judged])
    result["verdicts"] = [[line["key"] for line in verdicts[i]] for i in mine]
    details = [verdicts[i][0]["details"] for i in mine]
    rewards = {k: found["rewards"] for k, found in enumerate(details) if found and "rewards" in found}
    if rewards:
        scored = list(rewards)
        ours, theirs = np.array(list(rewards.values()), np.float64).T
        result["reward"] = {
            "reward, policy": list(cluster_bootstrap(ours, prompts[scored], seed=seed)),
            "reward, opponent": list(cluster_bootstrap(theirs, prompts[scored], seed=seed)),
        }
    if ratios is not None:
        rules = pairs[mine[0]].request.sampling
        is_kl = temperature == 1 and rules.top_k is rules.top_p is rules.min_p is None and not left_out
        name = "KL, nats" if is_kl else "log-ratio, nats"
        result["log_ratio"] = {name: list(cluster_bootstrap(ratios[mine], prompts, seed=seed))}
    return result


def describe_cut(sampled: Sequence[Pair], given: WinrateConfig) -> CutFigures:
    """Which part of each side's responses was cut off, of all that were sampled; None for the data's own."""
    theirs = [pair.opponent_has_ended for pair in sampled if pair.opponent_has_ended is not None]
    return {
        "at": given.max_new_tokens,
        "policy": float(np.mean([not pair.policy.has_ended for pair in sampled])),
        "opponent": float(np.mean(np.logical_not(theirs))) if theirs else None,
        "pairs_left_out": sum(pair.is_cut for pair in sampled) if given.leave_out_cut else 0,
    }


def _nothing_valid(temperature: float, verdicts: Sequence[tuple[VerdictLine, VerdictLine]]) -> str:
    """That there is nothing to count, and what was wrong most often."""
    problems = Counter(line["problem"] for both in verdicts for line in both if not line["choice"])
    (problem, count), *_ = problems.most_common(1)
    return (
        f"temperature {temperature:g}: none of {len(verdicts)} pairs has a valid verdict in both orders; "
        f"{count} times: {problem} (verdicts.jsonl in the output directory has every answer)"
    )


def describe_usage(given: WinrateConfig, lines: Sequence[VerdictLine]) -> Usage:
    """Tokens behind the verdicts, and what those cost that did not come from the cache.

    `unreported` answers came without a count of their tokens, which the cost therefore leaves out.
    """
    found = [line["details"] for line in lines]
    details = [detail for detail in found if detail and "prompt_tokens" in detail]
    paid = [detail for detail in details if not detail["cached"]]
    tokens = [sum(detail[name] for detail in paid) for name in ("prompt_tokens", "completion_tokens")]
    prices = given.endpoint.price_input, given.endpoint.price_output
    return {
        "answers": len(details),
        "from_cache": len(details) - len(paid),
        "unreported": sum(not detail["prompt_tokens"] for detail in paid),
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "cost": sum(price * count for price, count in zip(prices, tokens, strict=True)) / 1e6,
    }


def _as_judged(pair: Pair, policy_first: VerdictLine, opponent_first: VerdictLine) -> Judged:
    return Judged(
        prompt=json.dumps(pair.request.prompt),
        policy=pair.policy.text,
        opponent=pair.opponent,
        policy_first="tie" if pair.is_identical else policy_first["choice"],
        opponent_first="tie" if pair.is_identical else opponent_first["choice"],
        is_identical=pair.is_identical,
    )
