"""`dpo winrate` from start to end: sample both sides, judge every pair in both orders, write the figures.

Everything is kept as it is made (samples.jsonl, verdicts.jsonl, log_probs.jsonl), under keys of all that it
depends on; a second start with the same settings goes on, and with others uses what still holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from dpo.config import Config, WinrateConfig
from dpo.data.messages import response_text
from dpo.data.preferences import Preference
from dpo.huggingface.model_names import split_on_base
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_pretrained
from dpo.huggingface.text_models import read_config
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.judging.figures import (
    AskedLine,
    MatchResult,
    VerdictLine,
)
from dpo.judging.journal import Journal
from dpo.judging.judges import Judge, Log, Question, Verdict
from dpo.judging.kinds import find_kind, open_judge
from dpo.judging.local_judge import sequence_log_probs
from dpo.judging.match_figures import Pair, describe_cut, describe_temperature, describe_usage
from dpo.judging.prompts import choose_judge, prompt_key, read_prompts, with_length
from dpo.judging.results import VERDICTS_FILE, listed_files, read_as, write_result
from dpo.judging.samples import Player, Request, Sample, model_identity, sample_responses
from dpo.models.drawing import SamplingConfig
from dpo.models.vocabulary import require_known
from dpo.outcomes import UserError
from dpo.training.reading import given_chat_template
from dpo.training.same_tokens import name_alike
from dpo.training.talk import as_trained

DATA_OPPONENTS = {"data:best": 0, "data:worst": -1}
"""Opponents that are responses of the data: their place in the row, best first."""
ORDERS = ("policy_first", "opponent_first")
RESULT_SETTINGS = ("judge", "template", "samples", "max_new_tokens", "top_k", "top_p", "min_p")
RESULT_SETTINGS += ("leave_out_cut", "compute_dtype", "seed", "judge_template_kwargs")
"""What of its settings a result names, besides what is compared, on which data, at which temperatures."""
_LOG_EVERY = 50


def play(given: WinrateConfig, config: Config, *, output: Path, log: Log) -> tuple[MatchResult, Path]:
    """Win-rate figures of `config.model.source` against `config.model.reference` on `config.data.eval`.

    Returns them, and the file that holds them.
    """
    assert config.model.reference is not None
    given = replace(given, judge=choose_judge(given.judge, config.data.eval))
    arguments = given.judge_template_kwargs
    given = replace(
        given,
        judge_template_kwargs=config.data.template_kwargs if arguments is None else arguments,
        template_characters=config.data.template_characters,
    )
    judge = open_judge(given, log)
    if not (output / VERDICTS_FILE).exists():
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
        verdicts = judge_pairs(judge, pairs, journal, log, name=str(given.judge))
    ratios = None
    if given.kl and config.model.reference not in DATA_OPPONENTS:
        with Journal(output / "log_probs.jsonl") as journal:
            ratios = log_ratios(given, config, pairs, journal, log)
    directory, _ = split_on_base(config.model.source) or (Path(config.model.source).expanduser(), None)
    result: MatchResult = {
        "policy": config.model.source,
        "policy_files": listed_files(directory),
        "opponent": config.model.reference,
        "data": config.data.eval,
        "judge": judge.identity,
        "settings": {name: getattr(given, name) for name in RESULT_SETTINGS} | read_as(config.data),
        "temperatures": {
            str(temperature): describe_temperature(
                temperature,
                given.seed,
                pairs,
                verdicts,
                ratios,
                left_out=given.leave_out_cut
                and any(pair.is_cut and pair.temperature == temperature for pair in sampled),
            )
            for temperature in dict.fromkeys(given.temperatures)
        },
    }
    for temperature in dict.fromkeys(given.temperatures):
        mine = [pair for pair in sampled if pair.temperature == temperature]
        result["temperatures"][str(temperature)]["cut"] = describe_cut(mine, given)
    if given.judge is not None and find_kind(given.judge)[0].is_paid:
        result["usage"] = describe_usage(given, [line for both in verdicts for line in both])
    return result, write_result(output, result)


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
            template_characters=config.data.template_characters,
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
    judge: Judge, pairs: Sequence[Pair], journal: Journal, log: Log, *, name: str
) -> list[tuple[VerdictLine, VerdictLine]]:
    """The journal's lines on every pair in both orders; what is not there is asked, or tied if identical.

    `name` is the judge's as the user gave it.
    """
    lines = [_unjudged(judge, pair, order) for pair in pairs for order in ORDERS]
    for line, pair in zip(lines, [pair for pair in pairs for _ in ORDERS], strict=True):
        if pair.is_identical and not judge.scores_each and line["key"] not in journal.lines:
            verdict = Verdict("tie", "", details={"identical": True})
            journal.append(_judged(line, verdict))
    missing = [line for line in lines if not journal.lines.get(line["key"], {}).get("was_asked")]
    log(f"judge: {len(lines) - len(missing)} of {len(lines)} verdicts of {name} are there")
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
        problem = _why_no_ratios(config, missing.values())
        if problem is not None:
            log(f"{problem}: no log-ratios")
            return None
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


def _why_no_ratios(config: Config, responses: Iterable[Sample]) -> str | None:
    """Why the opponent can give the policy's responses no log-probs, token by token; None where it can."""
    policy, opponent = _sources(config)
    rows = [[*sample.prompt_tokens, *sample.tokens] for sample in responses]
    if not name_alike(load_tokenizer(policy), load_tokenizer(opponent), rows):
        return "policy and opponent have different tokens under the same numbers"
    try:
        require_known(rows, read_config(open_checkpoint(opponent).config)[1], source=opponent)
    except UserError:
        return f"{opponent} lacks tokens, or positions, of the policy's responses"
    return None


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


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
