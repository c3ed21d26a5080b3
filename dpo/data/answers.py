"""What the rows of each layout say of their responses: ranks (1 is best), scores, or a label."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo.data.choices import as_count, by_flags, by_index, by_side, by_strength, is_desirable
from dpo.data.columns import Columns
from dpo.data.malformed import MalformedRowError
from dpo.data.messages import Message, turn_of
from dpo.data.values import (
    finite,
    read_list,
    read_numbers,
    read_objects,
    read_score,
    read_scores,
    show_names,
)

Numbers = Sequence[int | float]
Scores = Numbers | None


class Answers(NamedTuple):
    """What a row says of its responses."""

    responses: dict[str, Any]
    """By the field that each stands in, for errors."""
    ranks: Numbers
    """Smaller is better, equal is a tie. Of one response alone: 0 is desirable, 1 undesirable."""
    scores: Scores = None
    """Higher is better, NaN where there is none."""


def read_two(value: Any, field: str) -> Sequence[Any]:
    """A list of two items.

    Raises:
      MalformedRowError: naming the field, for anything else.
    """
    items = read_list(value, field, least=2)
    if len(items) != 2:
        raise MalformedRowError(field, "length_mismatch", f"found {len(items)}; allowed are two")
    return items


_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
)
_FIRST_SCORES = tuple(names[0] for names in _PAIR_SCORES)


def pair_of(best: str, worst: str) -> Callable[[Columns], Answers]:
    """A preferred response and another in columns of these names, with their scores where a row has them."""

    def read(row: Columns) -> Answers:
        return Answers({best: row[best], worst: row[worst]}, (1, 2), _pair_scores(row))

    return read


def _pair_scores(row: Columns) -> Scores:
    if row.keys().isdisjoint(_FIRST_SCORES):
        return None
    found = next((names for names in _PAIR_SCORES if all(name in row for name in names)), None)
    scores = None if found is None else [read_score(row[name], name) for name in found]
    return None if scores is None or all(map(math.isnan, scores)) else scores


def two_outputs(row: Columns) -> Answers:
    """Alpaca's `output`: the preferred response first."""
    best, worst = read_two(row["output"], "output")
    return Answers({"output[0]": best, "output[1]": worst}, (1, 2))


def ranking(row: Columns) -> Answers:
    """Any number of `responses` with their `ranks` or `scores`."""
    given = read_list(row["responses"], "responses", least=2)
    if "ranks" not in row and "scores" not in row:
        raise MalformedRowError("ranks", "missing_field", "a ranking needs 'ranks' (1 is best) or 'scores'")
    fields = _FIELDS if len(given) <= len(_FIELDS) else [f"responses[{k}]" for k in range(len(given))]
    responses = dict(zip(fields, given, strict=False))
    if "ranks" in row:
        scores = read_scores(row["scores"], "scores", len(given)) if "scores" in row else None
        return Answers(responses, read_numbers(row["ranks"], "ranks", len(given)), scores)
    return _by_scores(responses, read_numbers(row["scores"], "scores", len(given)))


_FIELDS = tuple([f"responses[{k}]" for k in range(16)])


def _by_scores(responses: dict[str, Any], scores: Numbers) -> Answers:
    return Answers(responses, [-score for score in scores], scores)


def generations(row: Columns) -> Answers:
    """Distilabel's `generations` with a rating each."""
    name = row.find("ratings", "rating", "scores")
    assert name is not None
    given = read_list(row["generations"], "generations", least=2)
    scores = read_numbers(row[name], name, len(given))
    return _by_scores({f"generations[{k}]": value for k, value in enumerate(given)}, scores)


_ULTRAFEEDBACK_SCORES = ("overall_score", "fine-grained_score")
_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def completions(row: Columns) -> Answers:
    """UltraFeedback's: the overall score of each completion, or the mean of its ratings by aspect.

    All of a row are compared by the same: an overall score is of 10, a fine-grained one of 5.
    """
    items = [row.item(item) for item in read_objects(row["completions"], "completions", least=2)]
    responses = {f"completions[{k}].response": item.get("response") for k, item in enumerate(items)}
    known = [[name for name in _ULTRAFEEDBACK_SCORES if item.get(name) is not None] for item in items]
    shared = next((name for name in _ULTRAFEEDBACK_SCORES if all(name in mine for mine in known)), None)
    scores = [
        _mean_rating(item, f"completions[{k}]")
        if shared is None
        else finite(item[shared], f"completions[{k}].{shared}")
        for k, item in enumerate(items)
    ]
    return _by_scores(responses, scores)


def _mean_rating(item: Mapping[str, Any], field: str) -> float:
    ratings = item.get("annotations")
    ratings = ratings if isinstance(ratings, Mapping) else {}
    found = [
        finite(rating.get("Rating"), f"{field}.annotations.{aspect}.Rating")
        for aspect in _ASPECTS
        if isinstance(rating := ratings.get(aspect), Mapping)
    ]
    if not found:
        names = f"{', '.join(_ULTRAFEEDBACK_SCORES)}, annotations.*.Rating"
        detail = f"has no score that the others have; allowed is one of {names} in all completions"
        raise MalformedRowError(field, "missing_field", detail)
    return sum(found) / len(found)


def ranked_answers(row: Columns) -> Answers:
    """Nectar's `answers`, each with its rank."""
    items = [row.item(item) for item in read_objects(row["answers"], "answers", least=2)]
    responses = {f"answers[{k}].answer": item.get("answer") for k, item in enumerate(items)}
    return Answers(
        responses, [finite(item.get("rank"), f"answers[{k}].rank") for k, item in enumerate(items)]
    )


def ranked_completions(row: Columns) -> Answers:
    """NeMo RL's `completions`, each with its rank and the messages of a response."""
    items = [row.item(item) for item in read_objects(row["completions"], "completions", least=2)]
    responses = {f"completions[{k}].completion": item.get("completion") for k, item in enumerate(items)}
    return Answers(
        responses, [finite(item.get("rank"), f"completions[{k}].rank") for k, item in enumerate(items)]
    )


def voted_answers(row: Columns) -> Answers:
    """Stack Exchange's `answers` to a question, each with a score of its votes."""
    items = [row.item(item) for item in read_objects(row["answers"], "answers", least=2)]
    responses = {f"answers[{k}].text": item.get("text") for k, item in enumerate(items)}
    scores = [finite(item.get("pm_score"), f"answers[{k}].pm_score") for k, item in enumerate(items)]
    return _by_scores(responses, scores)


def scored_sides(row: Columns) -> Answers:
    """WebGPT's two answers with a score each, of which one is the other's negative."""
    scores = [finite(row[name], name) for name in ("score_0", "score_1")]
    return _by_scores({name: row[name] for name in ("answer_0", "answer_1")}, scores)


def last_turns(row: Columns) -> Answers:
    """ms-swift's `messages`, which end with the preferred response, and another for its place."""
    turns = read_list(row["messages"], "messages", least=2)
    other = [*turns[:-1], turn_of("assistant", row["rejected_response"], "rejected_response")]
    return Answers({"messages": turns, "rejected_response": other}, (1, 2))


def exchanges(value: Any, field: str) -> list[Message] | None:
    """Turns of a list of `{"input": ..., "output": ...}`, as Capybara's are; None where it is none."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return None
    if not value or not all({"input", "output"} <= item.keys() and "role" not in item for item in value):
        return None
    return [
        turn_of(role, item[key], f"{field}[{i}].{key}")
        for i, item in enumerate(value)
        for role, key in (("user", "input"), ("assistant", "output"))
    ]


def labelled(response: str, label: str) -> Callable[[Columns], Answers]:
    """One response with a label that says whether it is desirable."""

    def read(row: Columns) -> Answers:
        desirable = is_desirable(row[label], label)
        return Answers({response: row[response]}, (0 if desirable else 1,))

    return read


def rated_alone(row: Columns) -> Answers:
    """HelpSteer2's: one response a row, with its helpfulness."""
    return Answers({"response": row["response"]}, (0,), (finite(row["helpfulness"], "helpfulness"),))


def strength_of(first: str, second: str, strength: str) -> Callable[[Columns], Answers]:
    """Two responses and a number whose sign says which is preferred."""

    def read(row: Columns) -> Answers:
        return Answers({n: row[n] for n in (first, second)}, by_strength(row[strength], strength))

    return read


def safe_rlhf(row: Columns) -> Answers:
    """PKU-SafeRLHF's: two responses and the number of the better one."""
    ranks = by_index(row["better_response_id"], "better_response_id", first=0)
    return Answers({name: row[name] for name in ("response_0", "response_1")}, ranks)


def shp(row: Columns) -> Answers:
    """SHP's: two answers with their votes, and which has more."""
    names = ("human_ref_A", "human_ref_B")
    scores = [read_score(row.get(name), name) for name in ("score_A", "score_B")]
    return Answers({n: row[n] for n in names}, by_index(row["labels"], "labels", first=1), scores)


_SIDES = (
    ("conversation_a", "conversation_b"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
    ("output_1", "output_2"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_0", "response_1"),
)
_VERDICTS = ("winner", "preference", "label", "choice", "preferred")


def sides(row: Columns) -> Answers:
    """Two responses in columns of one kind, and a verdict on them, a tie among its words."""
    names, verdict = find_sides(row)
    ranks = by_side(
        row[verdict], verdict, names, row.reading.counts_from, setting=row.reading.setting("columns")
    )
    return Answers({name: row[name] for name in names}, ranks)


def battle(row: Columns) -> Answers:
    """Two conversations and a verdict; on their first `turn` exchanges, where they have more.

    MT-bench's verdicts on a first answer stand beside whole conversations; Chatbot Arena's number is of all.
    """
    found = sides(row)
    count = as_count(row.get("turn"))
    if count is None:
        return found
    return found._replace(
        responses={name: _first_exchanges(count, value, name) for name, value in found.responses.items()}
    )


def _first_exchanges(count: int, conversation: Any, field: str) -> Any:
    """What a conversation says up to the assistant's answer of this number."""
    if isinstance(conversation, str) and not conversation.lstrip().startswith("["):
        return conversation
    turns = read_list(conversation, field)
    roles = [turn.get("role") if isinstance(turn, Mapping) else None for turn in turns]
    ends = [i for i, role in enumerate(roles, start=1) if role == "assistant"]
    return turns[: ends[count - 1]] if count < len(ends) else turns


def find_sides(row: Columns) -> tuple[tuple[str, str], str]:
    """The columns of two responses, and that of the verdict on them.

    Raises:
      MalformedRowError: where there are none, or columns of several kinds.
    """
    kinds = [names for names in _SIDES if all(name in row for name in names)]
    if len(kinds) > 1:
        detail = (
            f"found {' and '.join(map(' + '.join, kinds))}; allowed are two responses of one kind, others by "
            "data.ignore_columns"
        )
        raise MalformedRowError("(row)", "ambiguous_format", detail)
    names = kinds[0] if kinds else None
    verdict = row.find(*_VERDICTS)
    if names is None or verdict is None:
        detail = (
            f"found {show_names(row)}; allowed are two of one kind: {' | '.join(map(' + '.join, _SIDES))}"
        )
        raise MalformedRowError("(row)", "missing_field", detail)
    return names, verdict


def flagged(row: Columns) -> Answers:
    """Chatbot Arena's battles with a flag for each outcome; of several turns the prompt is a list."""
    flags = ("winner_model_a", "winner_model_b", "winner_tie")
    ranks = by_flags({name: row[name] for name in flags})
    if not is_list_text(row["prompt"]):
        return Answers({name: row[name] for name in ("response_a", "response_b")}, ranks)
    asked = read_list(row["prompt"], "prompt")
    return Answers(
        {name: _interleave(asked, row[name], name) for name in ("response_a", "response_b")}, ranks
    )


def is_list_text(value: Any) -> bool:
    """Whether a value is a list, or JSON text of a list of texts."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith('["'))


def _interleave(asked: Sequence[Any], answered: Any, field: str) -> list[Message]:
    """One side of a battle of several turns: what was asked and answered, in turn."""
    answers = read_list(answered, field)
    if len(answers) != len(asked):
        detail = f"{len(answers)} answers to {len(asked)} prompts; allowed is one each"
        raise MalformedRowError(field, "length_mismatch", detail)
    return [
        turn_of(role, content, f"{name}[{i}]")
        for i, both in enumerate(zip(asked, answers, strict=True))
        for role, name, content in zip(("user", "assistant"), ("prompt", field), both, strict=True)
    ]
