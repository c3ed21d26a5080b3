"""From `Preference` to token ids: chat template, end tokens, truncation.

    prompt     template(messages, and the opening of the assistant's turn)
    response   template(messages, and the response's messages), what follows the prompt's ids

Both are rendered in full and tokenised in full (`dpo.data.encoding`).
Where a prompt is a plain string and the tokenizer has a chat template, the string becomes the user's
message; where it has none, prompt and response are joined as they are, after the tokenizer's BOS token if
it puts one. Nothing here looks for the padding token: it may equal the end token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.data.conversations import repeats_prompt
from dpo.data.encoding import (
    Drop,
    Encoder,
    EndToken,
    Row,
    encode,
    make_encoder,
    write,
)
from dpo.data.joining import Notes, TokenizedPart, join_parts
from dpo.data.messages import Message, Prompt, Turns, answer_turns, as_turns, message_text
from dpo.data.preferences import Preference
from dpo.data.shortening import Shortened, shorten_prompt
from dpo.data.templates import LIMITS, TEMPLATE_DATE, Marked
from dpo.data.tokenized import TokenizedDataset, flat_arrays
from dpo.data.tokenizer_calls import encode_texts
from dpo.outcomes import UserError

Truncation = Literal["drop", "error", "truncate_prompt_left", "truncate_response_right"]


def tokenize(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    truncation: Truncation = "drop",
    end_token: EndToken = "template",
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
    template_kwargs: Mapping[str, Any] | None = None,
    template_characters: int = LIMITS.characters,
) -> TokenizedDataset:
    """Token ids of every preference whose prompt plus longest response fits `max_length` or is cut to it.

    `truncation`: "drop" leaves longer preferences out, "error" raises, "truncate_prompt_left" takes the
    oldest turns out of the prompt and then the beginning of what is left of it (the same for all responses;
    BOS, system text and what opens each message stay), "truncate_response_right" keeps the start of each
    response (its end token goes first). `end_token`, what ends a scored response: "template" for all that
    the chat template puts after it, "eos_only" for the end token alone, "none" for nothing; without a
    template "template" is the tokenizer's EOS token. `chat_template` is the text of a jinja2 template
    that replaces the tokenizer's own, `template_date` the day that templates take for today, and
    `template_kwargs` are further arguments that it reads, `template_characters` how many it may write beside
    twice those that a text is made of. Raises `ValueError` when no preference is left.
    """
    _check_choice("truncation", truncation, Truncation)
    _check_choice("end_token", end_token, EndToken)
    part = tokenize_part(
        preferences,
        tokenizer,
        max_length=max_length,
        truncation=truncation,
        end_token=end_token,
        chat_template=chat_template,
        template_date=template_date,
        template_kwargs=template_kwargs,
        template_characters=template_characters,
    )
    return join_parts([part])


def tokenize_part(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: Truncation,
    end_token: EndToken,
    chat_template: str | None,
    template_date: str,
    template_kwargs: Mapping[str, Any] | None = None,
    template_characters: int = LIMITS.characters,
) -> TokenizedPart:
    """`tokenize` for some of the preferences, before it is known whether any is left in all."""
    encoder = make_encoder(
        tokenizer, end_token, chat_template, template_date, template_kwargs, template_characters
    )
    marks = _marks_of(tokenizer)
    notes = Notes()
    kept: list[tuple[int, Row]] = []
    too_long: list[str] = []
    for start in range(0, len(preferences), _CHUNK):
        chunk = preferences[start : start + _CHUNK]
        for offset, row in enumerate(encode(chunk, encoder)):
            location = chunk[offset].location
            if isinstance(row, Row) and _length(row) > max_length:
                if truncation == "error":
                    too_long.append(f"{location}: {_length(row)} tokens")
                row = _shorten(chunk[offset], row, encoder, max_length, truncation)
                notes.num_truncated += isinstance(row, Row)
            if isinstance(row, Row):
                kept.append((start + offset, row))
                said = (*_said_twice(chunk[offset]), *_marked(chunk[offset], marks))
                notes.remark((*row.remarks, *said), location)
            else:
                notes.drop(*row, location)
    chosen = [preferences[index] for index, _ in kept]
    arrays = flat_arrays(
        [row.prompt for _, row in kept],
        [row.responses for _, row in kept],
        ranks=[preference.ranks for preference in chosen],
        scores=[preference.scores for preference in chosen],
        scored=[row.scored for _, row in kept],
    )
    policies = {"truncation": truncation, "max_length": max_length, "end_token": end_token}
    policies |= {"template_kwargs": dict(template_kwargs)} if template_kwargs else {}
    text = None if encoder.template is None else encoder.template.texts
    return TokenizedPart(
        arrays,
        np.asarray([index for index, _ in kept], dtype=np.int64),
        len(preferences),
        dict(notes.counts),
        notes.first,
        notes.num_truncated,
        too_long,
        {"chat_template": text, **policies},
        dict(notes.remarks),
        notes.first_remarks,
    )


def tokenize_prompts(
    prompts: Sequence[Prompt | Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
    template_kwargs: Mapping[str, Any] | None = None,
    template_characters: int = LIMITS.characters,
    contexts: Sequence[Mapping[str, Any] | None] | None = None,
) -> list[list[int]]:
    """Token ids of prompts up to where the response begins, as `tokenize` gives them.

    `contexts` are tools, documents and arguments of each prompt (`Preference.context`).

    Raises:
      ValueError: for a conversation where there is no chat template, or one that the template refuses.
    """
    encoder = make_encoder(
        tokenizer, "template", chat_template, template_date, template_kwargs, template_characters
    )
    contexts = contexts or [None] * len(prompts)
    alone = [
        _alone(given, (), number, context)
        for number, (given, context) in enumerate(zip(prompts, contexts, strict=True), start=1)
    ]
    texts = [written[0].text for written in _write_or_raise(alone, encoder)]
    if encoder.template is None:
        texts = [text.rstrip(" ") or text for text in texts]  # as responses take the space in training
    return [encoder.bos + ids for ids in encode_texts(tokenizer, texts)]


def tokenize_answers(
    prompts: Sequence[Prompt | Sequence[Message]],
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
    template_kwargs: Mapping[str, Any] | None = None,
    template_characters: int = LIMITS.characters,
) -> list[list[int]]:
    """Token ids of prompts with one response each, the assistant's turn closed: what a reward model reads.

    Without a chat template that is BOS (where the tokenizer puts one), prompt and response as they are, EOS.

    Raises:
      ValueError: for a conversation where there is no chat template, or one that the template refuses.
    """
    encoder = make_encoder(
        tokenizer, "template", chat_template, template_date, template_kwargs, template_characters
    )
    pairs = [
        _alone(given, (text,), number, None)
        for number, (given, text) in enumerate(zip(prompts, responses, strict=True), start=1)
    ]
    texts = [written[-1].text for written in _write_or_raise(pairs, encoder)]
    return [encoder.bos + ids + encoder.ending for ids in encode_texts(tokenizer, texts)]


def _alone(
    given: Prompt | Sequence[Message],
    responses: tuple[str, ...],
    number: int,
    context: Mapping[str, Any] | None,
) -> Preference:
    prompt = given if isinstance(given, str) else tuple(given)
    ranks = (0,) * len(responses)
    return Preference(prompt, responses, ranks, None, "", f"prompt {number}", context)


def _write_or_raise(preferences: Sequence[Preference], encoder: Encoder) -> Iterator[list[Marked]]:
    for preference, written in zip(preferences, write(preferences, encoder), strict=True):
        if isinstance(written, Drop):
            raise UserError(f"{preference.location}: {written.detail}")
        yield written


_CHUNK = 512


# ---- length ----


def _said_twice(preference: Preference) -> tuple[str, ...]:
    """A remark on text responses that begin with the text of their prompt, and go on."""
    if not repeats_prompt(preference.prompt, preference.responses):
        return ()
    return ("the responses begin with the prompt, unlike those of most rows, and are learned as they are",)


def _marks_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What the tokenizer reads as its special tokens wherever a text has it; None where it has none."""
    marks = sorted(mark for mark in set(tokenizer.all_special_tokens) if len(mark) > 2 and not mark.isalnum())
    return re.compile("|".join(map(re.escape, marks))) if marks else None


def _marked(preference: Preference, marks: re.Pattern[str] | None) -> tuple[str, ...]:
    """A remark on texts with special tokens in them: as a rule a chat template wrote them already."""
    if marks is None:
        return ()
    answers = map(answer_turns, preference.responses)
    turns = (turn for said in (as_turns(preference.prompt), *answers) for turn in said)
    found = next((mark.group() for turn in turns if (mark := marks.search(message_text(turn)))), None)
    if found is None:
        return ()
    return (f"texts have {found} in them, a special token, as if a chat template had written them already",)


def _length(row: Row) -> int:
    return len(row.prompt) + max(map(len, row.responses))


def _shorten(
    preference: Preference, row: Row, encoder: Encoder, max_length: int, truncation: Truncation
) -> Row | Drop:
    """The row cut to `max_length` by the policy; the prompt stays the same for all responses."""
    detail = f"{len(row.prompt)} + {max(map(len, row.responses))} tokens, allowed are {max_length}"
    if truncation == "truncate_prompt_left":
        if max(map(len, row.responses)) >= max_length:
            return Drop("response_too_long", detail)
        return _shorten_prompt(preference, row, encoder, max_length, detail)
    if truncation == "truncate_response_right":
        return _shorten_responses(row, max_length - len(row.prompt), detail)
    return Drop("too_long", detail)


def _shorten_prompt(
    preference: Preference, row: Row, encoder: Encoder, max_length: int, detail: str
) -> Row | Drop:
    if encoder.template is None:
        room = max_length - max(map(len, row.responses)) - len(encoder.bos)
        if room < 1:
            return Drop("response_too_long", detail)
        return row._replace(
            prompt=encoder.bos + row.prompt[-room:],
            remarks=(*row.remarks, "the beginning of the prompt is cut off"),
        )
    rows: dict[int, Row] = {}

    def fits(prompt: Turns) -> bool:
        """Whether the preference with this prompt is short enough; keeps it."""
        (found,) = encode([preference._replace(prompt=prompt)], encoder)
        if isinstance(found, Row) and _length(found) <= max_length:
            rows[id(prompt)] = found
            return True
        return False

    shortened = shorten_prompt(as_turns(preference.prompt), fits)
    if shortened is None:
        return Drop("too_long_to_cut", f"{detail}; system text, last turn and response are longer")
    found = rows[id(shortened.prompt)]
    return found._replace(remarks=(*found.remarks, *_describe_cut(shortened)))


def _describe_cut(shortened: Shortened) -> list[str]:
    said = ["oldest turns of the prompt are left out"] if shortened.num_left_out else []
    return said + (["the beginning of the prompt's last turn is cut off"] if shortened.is_cut else [])


def _shorten_responses(row: Row, room: int, detail: str) -> Row | Drop:
    if room < 1:
        return Drop("prompt_too_long", detail)
    short = row._replace(
        responses=[response[:room] for response in row.responses],
        scored=row.scored and [mine[:room] for mine in row.scored],
    )
    if not all(map(any, short.scored or ())):
        return Drop("nothing_scored_after_truncation", detail)
    if len(set(map(tuple, short.responses))) == 1 < len(set(map(tuple, row.responses))):
        return Drop("identical_after_truncation", detail)
    return short


def _check_choice(name: str, value: str, choices: object) -> None:
    allowed = choices.__args__  # pyright: ignore[reportAttributeAccessIssue]
    if value not in allowed:
        raise UserError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
