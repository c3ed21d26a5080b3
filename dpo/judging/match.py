"""`dpo winrate` from start to end: sample both sides, judge every pair in both orders, write the figures.

Everything is kept as it is made (samples.jsonl, verdicts.jsonl, log_probs.jsonl), under keys of all that it
depends on; a second start with the same settings goes on, and with others uses what still holds.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from dpo.config import Config, WinrateConfig
from dpo.data.messages import response_text
from dpo.data.preferences import Preference
from dpo.evaluation.statistics import cluster_bootstrap
from dpo.files import replace_text
from dpo.huggingface.pretrained import load_pretrained
from dpo.judging.endpoint import EndpointJudge
from dpo.judging.figures import (
    AskedLine,
    CutFigures,
    MatchResult,
    Usage,
    VerdictLine,
    WinrateFigures,
)
from dpo.judging.journal import Journal
from dpo.judging.judges import Judge, Log, Question, Verdict
from dpo.judging.kinds import find_kind, open_judge
from dpo.judging.local_judge import sequence_log_probs
from dpo.judging.prompts import choose_judge, prompt_key, read_prompts, with_length
from dpo.judging.samples import Player, Request, Sample, model_identity, sample_responses
from dpo.judging.winrate import Judged, describe_pairs
from dpo.models.drawing import SamplingConfig
from dpo.outcomes import UserError
from dpo.training.reading import given_chat_template
from dpo.training.talk import as_trained

RESULT_FILE = "winrate.json"
VERDICTS_FILE = "verdicts.jsonl"
DATA_OPPONENTS = {"data:best": 0, "data:worst": -1}
"""Opponents that are responses of the data: their place in the row, best first."""
ORDERS = ("policy_first", "opponent_first")
RESULT_SETTINGS = ("judge", "template", "samples", "max_new_tokens", "top_k", "top_p", "min_p")
RESULT_SETTINGS += ("leave_out_cut", "compute_dtype", "limit", "seed")
RESULT_SETTINGS += ("row_layout", "columns", "ignore_columns", "chat_template", "template_kwargs")
"""What of its settings a result names, besides what is compared, on which data, at which temperatures."""
_LOG_EVERY = 50


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


def play(given: WinrateConfig, config: Config, *, output: Path, log: Log) -> MatchResult:
    """Win-rate figures of `config.model.source` against `config.model.reference` on `config.data.eval`."""
    assert config.model.reference is not None
    given = replace(given, judge=choose_judge(given.judge, config.data.eval))
    given = replace(given, judge_template_kwargs=given.judge_template_kwargs or config.data.template_kwargs)
    judge = open_judge(given, log)
    if isinstance(judge, EndpointJudge) and not (output / VERDICTS_FILE).exists():
        judge.require_usable()
    preferences = read_prompts(config, log)
    given = with_length(given, config, preferences, log)
    requests = [
        Request(preference.prompt, number, _sampling(given, temperature), preference.context)
        for temperature in dict.fromkeys(given.temperatures)
        for preference in preferences
        for number in range(given.samples)
    ]
    with Journal(output / "samples.jsonl") as journal:
        sampled = make_pairs(given, config, preferences, requests, journal, log)
    pairs = [pair for pair in sampled if not (given.leave_out_cut and pair.is_cut)]
    with Journal(output / VERDICTS_FILE) as journal:
        verdicts = judge_pairs(judge, pairs, journal, log)
    ratios = None
    if given.kl and config.model.reference not in DATA_OPPONENTS:
        with Journal(output / "log_probs.jsonl") as journal:
            ratios = log_ratios(given, config, pairs, journal, log)
    result: MatchResult = {
        "policy": config.model.source,
        "opponent": config.model.reference,
        "data": config.data.eval,
        "judge": judge.identity,
        "settings": {name: getattr(given, name) for name in RESULT_SETTINGS},
        "temperatures": {
            str(temperature): describe_temperature(temperature, given.seed, pairs, verdicts, ratios)
            for temperature in dict.fromkeys(given.temperatures)
        },
    }
    for temperature in dict.fromkeys(given.temperatures):
        mine = [pair for pair in sampled if pair.temperature == temperature]
        result["temperatures"][str(temperature)]["cut"] = describe_cut(mine, given)
    if given.judge is not None and find_kind(given.judge)[0].is_paid:
        result["usage"] = describe_usage(given, [line for both in verdicts for line in both])
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    replace_text(output / RESULT_FILE, text, what="the win-rate")
    return result


def make_pairs(
    given: WinrateConfig,
    config: Config,
    preferences: Sequence[Preference],
    requests: Sequence[Request],
    journal: Journal,
    log: Log,
) -> list[Pair]:
    """Both responses to every request: sampled, or the data's own."""
    assert config.model.reference is not None
    chat_template = given_chat_template(config.data)

    def answer(role: str, source: str) -> list[Sample]:
        return sample_responses(
            Player(role, source, f"{model_identity(source)} {given.compute_dtype}"),
            requests,
            journal=journal,
            load=lambda: as_trained(
                load_pretrained(source, compute_dtype=jnp.dtype(given.compute_dtype)), config.data
            ),
            seed=given.seed,
            batch_size=given.batch_size,
            chat_template=chat_template,
            template_date=config.data.template_date,
            template_kwargs=config.data.template_kwargs,
            log=log,
        )

    policy = answer("policy", config.model.source)
    if config.model.reference in DATA_OPPONENTS:
        place = DATA_OPPONENTS[config.model.reference]
        own = {prompt_key(row): response_text(row.responses[place]).strip() for row in preferences}
        return [
            Pair(request, ours, own[prompt_key(request)], None, None)
            for request, ours in zip(requests, policy, strict=True)
        ]
    theirs = answer("opponent", config.model.reference)
    return [
        Pair(r, p, o.text, o.prompt_tokens, o.has_ended)
        for r, p, o in zip(requests, policy, theirs, strict=True)
    ]


def judge_pairs(
    judge: Judge, pairs: Sequence[Pair], journal: Journal, log: Log
) -> list[tuple[VerdictLine, VerdictLine]]:
    """The journal's lines on every pair in both orders; what is not there is asked, or tied if identical."""
    lines = [_unjudged(judge, pair, order) for pair in pairs for order in ORDERS]
    for line, pair in zip(lines, [pair for pair in pairs for _ in ORDERS], strict=True):
        if pair.is_identical and not judge.scores_each and line["key"] not in journal.lines:
            verdict = Verdict("tie", "", details={"identical": True})
            journal.append(_judged(line, verdict))
    missing = [line for line in lines if not journal.lines.get(line["key"], {}).get("was_asked")]
    log(f"judge: {len(lines) - len(missing)} of {len(lines)} verdicts are there ({judge.identity['judge']})")
    questions = [_question(line) for line in missing]
    for count, (index, verdict) in enumerate(judge.ask(questions) if questions else (), start=1):
        journal.append(_judged(missing[index], verdict))
        if count % _LOG_EVERY == 0:
            log(f"judge: {count} of {len(missing)} missing verdicts")
    found = cast("list[VerdictLine]", [journal.lines[line["key"]] for line in lines])
    return list(zip(found[::2], found[1::2], strict=True))


def log_ratios(
    given: WinrateConfig, config: Config, pairs: Sequence[Pair], journal: Journal, log: Log
) -> np.ndarray | None:
    """log policy − log opponent of every response of the policy; None where their tokens differ."""
    assert config.model.reference is not None
    if any(pair.policy.prompt_tokens != pair.opponent_tokens for pair in pairs):
        log("policy and opponent make different tokens: no log-ratios")
        return None
    models = {role: source for role, source in zip(("policy", "opponent"), _sources(config), strict=True)}
    identities = {role: model_identity(source) for role, source in models.items()}
    keys = [
        _digest(identities, given.compute_dtype, pair.policy.prompt_tokens, pair.policy.tokens)
        for pair in pairs
    ]
    missing = {key: pair.policy for key, pair in zip(keys, pairs, strict=True) if key not in journal.lines}
    if missing:
        log(f"scoring {len(missing)} responses of the policy under both models")
        prompts = [sample.prompt_tokens for sample in missing.values()]
        responses = [sample.tokens for sample in missing.values()]
        logps = {
            role: sequence_log_probs(source, prompts, responses, compute_dtype=given.compute_dtype)
            for role, source in models.items()
        }
        for place, key in enumerate(missing):
            journal.append({"key": key} | {role: float(values[place]) for role, values in logps.items()})
    return np.array([journal.lines[key]["policy"] - journal.lines[key]["opponent"] for key in keys])


def describe_temperature(
    temperature: float,
    seed: int,
    pairs: Sequence[Pair],
    verdicts: Sequence[tuple[VerdictLine, VerdictLine]],
    ratios: np.ndarray | None,
) -> WinrateFigures:
    """The win-rate at one temperature; where they are known, mean rewards and the policy's log-ratio."""
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
        is_kl = temperature == 1 and rules.top_k is rules.top_p is rules.min_p is None
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


def _sources(config: Config) -> tuple[str, str]:
    assert config.model.reference is not None
    return config.model.source, config.model.reference


def _sampling(given: WinrateConfig, temperature: float) -> SamplingConfig:
    assert given.max_new_tokens is not None, "with_length has one"
    return SamplingConfig(
        max_new_tokens=given.max_new_tokens,
        temperature=temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
    )


def _unjudged(judge: Judge, pair: Pair, order: str) -> AskedLine:
    """A line of the journal without its verdict."""
    line = {
        "order": order,
        "prompt": pair.request.prompt,
        "policy": pair.policy.text,
        "opponent": pair.opponent,
        "temperature": pair.request.sampling.temperature,
        "number": pair.request.number,
        "judge": judge.identity,
    }
    return cast("AskedLine", {"key": _digest(line), **line})


def _judged(line: AskedLine, verdict: Verdict) -> VerdictLine:
    ours = {"first": "policy", "second": "opponent"}
    theirs = {"first": "opponent", "second": "policy"}
    names = ours if line["order"] == "policy_first" else theirs
    winner = None if verdict.choice is None else names.get(verdict.choice, "tie")
    return {
        **line,
        "winner": winner,
        "choice": verdict.choice,
        "answer": verdict.answer,
        "problem": verdict.problem,
        "was_asked": verdict.was_asked,
        "details": verdict.details,
    }


def _question(line: AskedLine) -> Question:
    ours, theirs = line["policy"], line["opponent"]
    both = (ours, theirs) if line["order"] == "policy_first" else (theirs, ours)
    return Question(line["prompt"], *both)


def _as_judged(pair: Pair, policy_first: VerdictLine, opponent_first: VerdictLine) -> Judged:
    return Judged(
        prompt=json.dumps(pair.request.prompt),
        policy=pair.policy.text,
        opponent=pair.opponent,
        policy_first="tie" if pair.is_identical else policy_first["choice"],
        opponent_first="tie" if pair.is_identical else opponent_first["choice"],
        is_identical=pair.is_identical,
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
