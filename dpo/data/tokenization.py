"""From `Preference` to token ids: chat template, end tokens, truncation. The only place tokens are made.

    prompt     template(messages, and the opening of the assistant's turn)
    response   template(messages, and the assistant's message), what follows the prompt's ids

Both are rendered in full and tokenised in full; the first must be an exact prefix of the second, token by
token, else the row is dropped and counted (templates that rewrite earlier turns, merges over the border).
Where a prompt is a plain string and the tokenizer has a chat template, the string becomes the user's
message; where it has none, prompt and response are joined as they are, after the tokenizer's BOS token if
it puts one. Nothing here looks for the padding token: it may equal the end token.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from dpo.data.preferences import Message, Preference
from dpo.data.templates import TEMPLATE_DATE, Refusal, SandboxedTemplate

Truncation = Literal["drop", "error", "truncate_prompt_left", "truncate_response_right"]
EndToken = Literal["template", "eos_only", "none"]


@dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Token ids of n prompts and their m responses in all, end to end, and what was left out."""

    prompt_tokens: Int[np.ndarray, " A"]
    prompt_offsets: Int[np.ndarray, " _"]
    """Prompt i is `prompt_tokens[prompt_offsets[i]:prompt_offsets[i + 1]]`."""
    response_tokens: Int[np.ndarray, " B"]
    response_offsets: Int[np.ndarray, " _"]
    """Response j is `response_tokens[response_offsets[j]:response_offsets[j + 1]]`."""
    row_offsets: Int[np.ndarray, " _"]
    """Responses of prompt i, best first, are row_offsets[i] … row_offsets[i + 1] − 1."""
    ranks: Int[np.ndarray, " m"]
    scores: Float[np.ndarray, " m"]
    """Given scores; NaN where the data has none."""
    origin: Int[np.ndarray, " n"]
    """Index of each row in the list of preferences that was tokenised."""
    fingerprint: str
    """SHA-256 over token ids, order, ranks, scores, template text and policies."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Preferences left out, by reason."""
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Where the first preference of each reason stands, and what was found."""
    num_truncated: int = 0
    """Preferences that lost tokens to the truncation policy."""

    def __len__(self) -> int:
        return len(self.origin)

    @property
    def num_responses(self) -> Int[np.ndarray, " n"]:
        """K of every prompt."""
        return np.diff(self.row_offsets)

    @property
    def max_responses(self) -> int:
        """The K that a batch of these rows has."""
        return int(self.num_responses.max())

    @property
    def prompt_lengths(self) -> Int[np.ndarray, " n"]:
        """Tokens of every prompt."""
        return np.diff(self.prompt_offsets)

    @property
    def response_lengths(self) -> Int[np.ndarray, "n K"]:
        """Scored tokens of every response; 0 where absent."""
        counts = self.num_responses
        lengths = np.zeros((len(self), self.max_responses), dtype=np.int64)
        lengths[np.arange(self.max_responses) < counts[:, None]] = np.diff(self.response_offsets)
        return lengths

    def prompt(self, row: int | np.integer) -> Int[np.ndarray, " _"]:
        """Token ids of one prompt."""
        return self.prompt_tokens[self.prompt_offsets[row] : self.prompt_offsets[row + 1]]

    def responses(self, row: int | np.integer) -> list[Int[np.ndarray, " _"]]:
        """Token ids of one prompt's responses, best first."""
        offsets = self.response_offsets[self.row_offsets[row] : self.row_offsets[row + 1] + 1]
        return [self.response_tokens[a:b] for a, b in pairwise(offsets)]


def tokenize(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    truncation: Truncation = "drop",
    end_token: EndToken = "template",
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
) -> TokenizedDataset:
    """Token ids of every preference whose prompt plus longest response fits `max_length` or is cut to it.

    `truncation`: "drop" leaves longer preferences out, "error" raises, "truncate_prompt_left" keeps the
    end of the prompt (the same for all responses), "truncate_response_right" keeps the start of each
    response (its end token goes first). `end_token`, what ends a scored response: "template" for all that
    the chat template puts after it, "eos_only" for the end token alone, "none" for nothing; without a
    template "template" is the tokenizer's EOS token. `chat_template` is the text of a jinja2 template
    that replaces the tokenizer's own, `template_date` the day that templates take for today. Raises
    `ValueError` when no preference is left.
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
    )
    return join_parts([part])


class TokenizedPart(NamedTuple):
    """Token ids of preferences that are one after the other in the data, some of all."""

    arrays: dict[str, Any]
    """As in a `TokenizedDataset`; offsets count from the part's start, and so does origin."""
    origin: Int[np.ndarray, " n"]
    num_preferences: int
    """How many were tokenised, the dropped ones included."""
    dropped: dict[str, int]
    first_dropped: dict[str, str]
    num_truncated: int
    too_long: list[str]
    """Where preferences longer than `max_length` stand, and their length."""
    settings: dict[str, Any]
    """Template text and policies, the same in all parts."""


def tokenize_part(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: Truncation,
    end_token: EndToken,
    chat_template: str | None,
    template_date: str,
) -> TokenizedPart:
    """`tokenize` for some of the preferences, before it is known whether any is left in all."""
    encoder = _make_encoder(tokenizer, end_token, chat_template, template_date)
    notes = _Notes()
    kept: list[tuple[int, _Row]] = []
    too_long: list[str] = []
    for start in range(0, len(preferences), _CHUNK):
        chunk = preferences[start : start + _CHUNK]
        for offset, row in enumerate(_encode(chunk, encoder)):
            location = chunk[offset].location
            if isinstance(row, _Row) and _length(row) > max_length:
                too_long.append(f"{location}: {_length(row)} tokens")
                row = _shorten(row, max_length, truncation)
                notes.num_truncated += isinstance(row, _Row)
            if isinstance(row, _Row):
                kept.append((start + offset, row))
            else:
                notes.drop(row, location)
    chosen = [preferences[index] for index, _ in kept]
    arrays = _arrays(
        [row.prompt for _, row in kept],
        [row.responses for _, row in kept],
        ranks=[preference.ranks for preference in chosen],
        scores=[preference.scores for preference in chosen],
    )
    policies = {"truncation": truncation, "max_length": max_length, "end_token": end_token}
    text = None if encoder.template is None else encoder.template.text
    return TokenizedPart(
        arrays,
        np.asarray([index for index, _ in kept], dtype=np.int64),
        len(preferences),
        dict(notes.counts),
        notes.first,
        notes.num_truncated,
        too_long,
        {"chat_template": text, **policies},
    )


def join_parts(parts: Sequence[TokenizedPart]) -> TokenizedDataset:
    """The data set of all parts, the same to the bit however many there are.

    Raises:
      ValueError: when a preference is too long and may be neither cut nor dropped, or when none is left.
    """
    settings = parts[0].settings
    too_long = [line for part in parts for line in part.too_long]
    if too_long and settings["truncation"] == "error":
        raise ValueError(_too_long_message(too_long, settings["max_length"]))
    notes = _Notes()
    for part in parts:
        notes.add(part)
    arrays = {}
    for name in parts[0].arrays:
        join = _join_offsets if name.endswith("_offsets") else np.concatenate
        arrays[name] = join([part.arrays[name] for part in parts])
    starts = np.cumsum([0, *(part.num_preferences for part in parts[:-1])])
    counts = [len(part.origin) for part in parts]
    origin = np.concatenate([part.origin for part in parts]) + np.repeat(starts, counts)
    if not len(origin):
        raise ValueError(f"no preference is left after tokenisation: {notes.describe()}")
    return TokenizedDataset(
        **arrays,
        origin=origin,
        fingerprint=_fingerprint(arrays, settings),
        dropped=dict(notes.counts),
        first_dropped=notes.first,
        num_truncated=notes.num_truncated,
    )


def tokenize_prompts(
    prompts: Sequence[str | Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
) -> list[list[int]]:
    """Token ids of prompts up to where the response begins, as `tokenize` gives them.

    Raises:
      ValueError: for a conversation where there is no chat template, or one that the template refuses.
    """
    encoder = _make_encoder(tokenizer, "template", chat_template, template_date)
    alone = [
        Preference(given if isinstance(given, str) else tuple(given), (), (), None, "", f"prompt {number}")
        for number, given in enumerate(prompts, start=1)
    ]
    texts: list[str] = []
    for preference, rendered in zip(alone, _render(alone, encoder), strict=True):
        if isinstance(rendered, _Drop):
            raise ValueError(f"{preference.location}: {rendered.detail}")
        texts += rendered
    return [encoder.bos + ids for ids in _ids(tokenizer, texts)]


def tokenize_answers(
    prompts: Sequence[str | Sequence[Message]],
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
) -> list[list[int]]:
    """Token ids of prompts with one response each, the assistant's turn closed: what a reward model reads.

    Without a chat template that is BOS (where the tokenizer puts one), prompt and response as they are, EOS.

    Raises:
      ValueError: for a conversation where there is no chat template, or one that the template refuses.
    """
    encoder = _make_encoder(tokenizer, "template", chat_template, template_date)
    pairs = [
        Preference(
            given if isinstance(given, str) else tuple(given), (text,), (0,), None, "", f"prompt {number}"
        )
        for number, (given, text) in enumerate(zip(prompts, responses, strict=True), start=1)
    ]
    texts: list[str] = []
    for preference, rendered in zip(pairs, _render(pairs, encoder), strict=True):
        if isinstance(rendered, _Drop):
            raise ValueError(f"{preference.location}: {rendered.detail}")
        texts.append(rendered[-1])
    return [encoder.bos + ids + encoder.ending for ids in _ids(tokenizer, texts)]


def make_dataset(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    ranks: Sequence[Sequence[int]] | None = None,
    scores: Sequence[Sequence[float] | None] | None = None,
    settings: Mapping[str, object] | None = None,
) -> TokenizedDataset:
    """A data set from token ids: of each prompt, and of its responses, best first.

    Without `ranks` there are no ties. `settings` is what made the ids, for the fingerprint.
    """
    arrays = _arrays(
        prompts,
        responses,
        ranks=ranks or [range(len(mine)) for mine in responses],
        scores=scores or [None] * len(responses),
    )
    return TokenizedDataset(
        **arrays,
        origin=np.arange(len(prompts), dtype=np.int64),
        fingerprint=_fingerprint(arrays, settings or {}),
    )


_CHUNK = 2048


class _Row(NamedTuple):
    """One preference in tokens."""

    prompt: list[int]
    responses: list[list[int]]


class _Drop(NamedTuple):
    """Why a preference is left out."""

    reason: str
    detail: str


class _Notes:
    """Counts of what was left out or cut."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.num_truncated = 0

    def drop(self, why: _Drop, location: str) -> None:
        self.counts[why.reason] += 1
        self.first.setdefault(why.reason, f"{location}: {why.detail}")

    def add(self, part: TokenizedPart) -> None:
        self.counts.update(part.dropped)
        self.first |= {**part.first_dropped, **self.first}
        self.num_truncated += part.num_truncated

    def describe(self) -> str:
        parts = [f"{count} x {reason} (first: {self.first[reason]})" for reason, count in self.counts.items()]
        return "; ".join(parts) or "there were none"


# ---- text to ids ----


class _Encoder(NamedTuple):
    """How texts become ids, and what ends a response."""

    tokenizer: PreTrainedTokenizerBase
    template: SandboxedTemplate | None
    bos: list[int]
    """What precedes a raw text; a template brings its own."""
    trailer: list[int] | None
    """Ids that the template puts after a response and that are cut off; nothing is cut when None."""
    ending: list[int]
    """Ids put after a response, once its trailer is cut off."""


def _make_encoder(
    tokenizer: PreTrainedTokenizerBase, end_token: EndToken, chat_template: str | None, date: str
) -> _Encoder:
    if chat_template is None and tokenizer.chat_template is None:
        bos = _find_bos(tokenizer)
        ending = [] if end_token == "none" else [_eos_id(tokenizer)]
        return _Encoder(tokenizer, None, bos, None, ending)
    name = "the tokenizer's chat template" if chat_template is None else "data.chat_template"
    template = SandboxedTemplate(tokenizer.get_chat_template(chat_template), name=name, date=date)
    if end_token == "template":
        return _Encoder(tokenizer, template, [], None, [])
    trailer = _find_trailer(tokenizer, template)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    end = next((token for token in trailer if token in special), None)
    ending = [] if end_token == "none" else [_eos_id(tokenizer) if end is None else end]
    return _Encoder(tokenizer, template, [], trailer, ending)


def _encode(preferences: Sequence[Preference], encoder: _Encoder) -> Iterable[_Row | _Drop]:
    """Render and tokenise a chunk at once: every text only once, in one call of the tokenizer."""
    rendered = _render(preferences, encoder)
    texts = dict.fromkeys(text for texts in rendered if not isinstance(texts, _Drop) for text in texts)
    ids = dict(zip(texts, _ids(encoder.tokenizer, list(texts)), strict=True))
    for texts in rendered:
        if isinstance(texts, _Drop):
            yield texts
        else:
            yield _split([ids[text] for text in texts], encoder)


def _render(preferences: Sequence[Preference], encoder: _Encoder) -> list[list[str] | _Drop]:
    """Of each preference the text of the prompt, and of the prompt with each response."""
    if encoder.template is None:
        return [_join_raw(preference) for preference in preferences]
    conversations = [_conversations(preference) for preference in preferences]
    inputs = [
        _variables(encoder.tokenizer, messages, open_turn=number == 0)
        for mine in conversations
        for number, messages in enumerate(mine)
    ]
    rendered = iter(encoder.template.render_all(inputs))
    return [_texts(list(islice(rendered, len(mine)))) for mine in conversations]


def _join_raw(preference: Preference) -> list[str] | _Drop:
    prompt = preference.prompt
    if isinstance(prompt, str):
        return [prompt, *(prompt + response for response in preference.responses)]
    raise ValueError(
        f"{preference.location}: the prompt is a conversation, and the tokenizer has no chat template; "
        "allowed are prompts and responses as strings, or a chat template given by data.chat_template"
    )


def _conversations(preference: Preference) -> list[tuple[Message, ...]]:
    """The prompt alone, and the prompt with each response."""
    prompt = preference.prompt
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    answers = ({"role": "assistant", "content": response} for response in preference.responses)
    return [messages, *((*messages, answer) for answer in answers)]


def _variables(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, open_turn: bool
) -> dict[str, object]:
    """What a chat template sees, as in `tokenizer.apply_chat_template`."""
    return {
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": open_turn,
        **tokenizer.special_tokens_map,
    }


def _texts(rendered: Sequence[str | Refusal]) -> list[str] | _Drop:
    refusal = next((text for text in rendered if isinstance(text, Refusal)), None)
    if refusal is not None:
        return _Drop("template_error", f"the chat template refuses the conversation: {refusal.reason}")
    return [text for text in rendered if isinstance(text, str)]


def _split(ids: list[list[int]], encoder: _Encoder) -> _Row | _Drop:
    """Prompt and responses from the ids of the prompt and of the prompt with each response."""
    start = len(ids[0])
    if any(whole[:start] != ids[0] for whole in ids[1:]):
        return _Drop("prompt_not_prefix", "the prompt's tokens do not begin the prompt with its response")
    prompt, responses = encoder.bos + ids[0], [whole[start:] for whole in ids[1:]]
    if encoder.trailer is not None:
        cut = len(encoder.trailer)
        if any(response[len(response) - cut :] != encoder.trailer for response in responses):
            return _Drop("end_not_found", "the response does not end with what the template puts after it")
        responses = [response[: len(response) - cut] for response in responses]
    responses = [response + encoder.ending for response in responses]
    if not prompt or not all(responses):
        return _Drop("no_tokens", "the prompt or a response has no token")
    return _Row(prompt, responses)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _find_trailer(tokenizer: PreTrainedTokenizerBase, template: SandboxedTemplate) -> list[int]:
    """Ids of what the template puts after a response."""
    probe = "Zwölf Boxkämpfer jagen Viktor"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": probe}]
    text = template.render(_variables(tokenizer, messages, open_turn=False))
    if probe not in text:
        raise ValueError("the chat template leaves out the assistant's message; end_token must be 'template'")
    return _ids(tokenizer, [text[text.rindex(probe) + len(probe) :]])[0]


def _find_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's BOS token if it begins every text with it."""
    with_special = tokenizer(["a"], add_special_tokens=True)["input_ids"][0]
    return [token for token in with_special[:1] if token == tokenizer.bos_token_id]


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("the tokenizer has no EOS token to end a response; allowed end_token: 'none'")
    return tokenizer.eos_token_id


# ---- length ----


def _length(row: _Row) -> int:
    return len(row.prompt) + max(map(len, row.responses))


def _shorten(row: _Row, max_length: int, truncation: Truncation) -> _Row | _Drop:
    """The row cut to `max_length` by the policy; the prompt stays the same for all responses."""
    detail = f"{len(row.prompt)} + {max(map(len, row.responses))} tokens, allowed are {max_length}"
    if truncation == "truncate_prompt_left":
        room = max_length - max(map(len, row.responses))
        if room < 1:
            return _Drop("response_too_long", detail)
        return _Row(row.prompt[-room:], row.responses)
    if truncation == "truncate_response_right":
        room = max_length - len(row.prompt)
        if room < 1:
            return _Drop("prompt_too_long", detail)
        short = _Row(row.prompt, [response[:room] for response in row.responses])
        if len(set(map(tuple, short.responses))) == 1 < len(set(map(tuple, row.responses))):
            return _Drop("identical_after_truncation", detail)
        return short
    return _Drop("too_long", detail)


def _too_long_message(too_long: list[str], max_length: int) -> str:
    shown = "\n  ".join(too_long[:20])
    more = f"\n  and {len(too_long) - 20} more" if len(too_long) > 20 else ""
    return (
        f"{len(too_long)} preferences are longer than max_length {max_length}:\n  {shown}{more}\n"
        "Raise max_length, or choose truncation drop, truncate_prompt_left or truncate_response_right."
    )


def _check_choice(name: str, value: str, choices: object) -> None:
    allowed = choices.__args__  # pyright: ignore[reportAttributeAccessIssue]
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


# ---- arrays ----


def _arrays(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    ranks: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float] | None],
) -> dict[str, Any]:
    """What a `TokenizedDataset` holds of prompts and responses."""
    prompt_tokens, prompt_offsets = _join(prompts)
    response_tokens, response_offsets = _join([response for mine in responses for response in mine])
    nothing = float("nan")
    filled = [s or [nothing] * len(mine) for s, mine in zip(scores, responses, strict=True)]
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_offsets": prompt_offsets,
        "response_tokens": response_tokens,
        "response_offsets": response_offsets,
        "row_offsets": np.cumsum([0, *map(len, responses)], dtype=np.int64),
        "ranks": np.asarray([rank for mine in ranks for rank in mine], dtype=np.int32),
        "scores": np.asarray([score for mine in filled for score in mine], dtype=np.float32),
    }


def _join(pieces: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " _"]]:
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return np.fromiter((token for piece in pieces for token in piece), np.int32, int(offsets[-1])), offsets


def _join_offsets(parts: Sequence[Int[np.ndarray, " _"]]) -> Int[np.ndarray, " _"]:
    """Offsets of parts that stand end to end, each part's beginning with 0."""
    starts = np.cumsum([0, *(part[-1] for part in parts[:-1])])
    shifted = [part[1:] + start for part, start in zip(parts, starts, strict=True)]
    return np.concatenate([parts[0][:1], *shifted])


def _fingerprint(arrays: dict[str, np.ndarray], settings: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
