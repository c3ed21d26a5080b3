"""A run's preferences: where the settings say they are, read and made into token ids, their texts apart.

Training, evaluation, planning and inspection read the same here, so that all see the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
from jaxtyping import Int

from dpo.config import DataConfig
from dpo.config.data import TemplateArguments
from dpo.data.chunks import Notice, TokenJob
from dpo.data.encoding import EndToken
from dpo.data.mixing import Drawn, Share, Source, mix, take
from dpo.data.parts import ALONE, Peers, read_together, tokenize_together
from dpo.data.preferences import (
    Preference,
    ReadSummary,
    digest,
    each_preference,
    fingerprint,
    join_summaries,
)
from dpo.data.prepared import Prepared, Store, join_locations, prepare
from dpo.data.sources import Part
from dpo.data.templates import read_template
from dpo.data.tokenization import Truncation, tokenize, tokenize_part
from dpo.data.tokenized import TokenizedDataset
from dpo.huggingface.embedded import cache_directory
from dpo.outcomes import UserError
from dpo.parallel.distributed import from_all, on_main
from dpo.training.places import Place, places


class Dataset(NamedTuple):
    """Preferences as token ids, and what is known of their rows; `read_texts` has what these say."""

    read: ReadSummary
    tokens: TokenizedDataset
    locations: Sequence[str]
    """Where every preference stands that was read; `tokens.origin` counts in these."""
    content: str
    """SHA-256 of what the preferences say, wherever they stand and whoever read them."""
    mixture: Sequence[Drawn] = ()
    """What was drawn of each source, where there are several."""
    not_drawn: Int[np.ndarray, " n"] | None = None
    """Of preferences that could be in the mixture and are not: their places in `locations`."""

    def location(self, row: int | np.integer) -> str:
        """Where a tokenised row stands in the data."""
        return self.locations[int(self.tokens.origin[row])]

    def location_without_score(self) -> str | None:
        """Where the first row stands that has a response without a score; None where all have one."""
        missing = np.isnan(self.tokens.scores)
        if not missing.any():
            return None
        return self.location(np.searchsorted(self.tokens.row_offsets, missing.argmax(), side="right") - 1)


def all_processes() -> Peers:
    """The processes of this run, where all of them call the same."""
    return Peers(jax.process_index(), jax.process_count(), on_main, from_all)


def to_stderr(text: str) -> None:
    """Say something beside a command's output."""
    print(text, file=sys.stderr, flush=True)


def read_dataset(
    config: DataConfig,
    tokenizer: Any,
    *,
    heldout: bool = False,
    peers: Peers = ALONE,
    log: Callable[[str], None] = to_stderr,
    notice: Notice | None = None,
) -> Dataset:
    """The tokens of the training preferences, or of the held-out ones, from the store where it has them.

    Several `peers` of one host make them once; without a store each of them makes a part.
    `notice` is called with the preferences that are read for it in this process, in order: all, or some, or
    none of them.

    Raises:
      ValueError: naming file, line, field and reason of malformed rows, or a chat template that is not there.
    """
    mixed = places(config, heldout=heldout)
    found = [_read_one(config, place, tokenizer, peers, log, notice) for place in mixed]
    shares = [place.share for place in mixed if place.share is not None]
    return _mix(shares, found) if shares else found[0]


def _read_one(
    config: DataConfig,
    place: Place,
    tokenizer: Any,
    peers: Peers,
    log: Callable[[str], None],
    notice: Notice | None,
) -> Dataset:
    policies = _token_policies(config)
    store = token_store(config)
    if peers.count > 1 and store is None:
        return _read_in_parts(config, place, tokenizer, policies, peers)
    job = TokenJob(place.source, place.split, config.expand, place.reading, tokenizer, policies)
    own: list[Prepared] = []

    def prepare_own() -> bytes:
        own.append(
            prepare(
                job,
                on_error=config.on_error,
                limit=place.limit,
                store=store,
                log=log,
                notice=None if notice is None else place.labelling(notice),
            )
        )
        return own[0].tokens.fingerprint.encode()

    made = peers.from_all(prepare_own)
    if len(set(made)) > 1:
        raise UserError(
            f"{place.source}: process {next(i for i, one in enumerate(made) if one != made[0])} makes other "
            "tokens of it than process 0; allowed is the same data everywhere"
        )
    return Dataset(*own[0])


def _mix(shares: Sequence[Share], found: Sequence[Dataset]) -> Dataset:
    """What is drawn of several sources, as one data set."""
    tokens, drawn = mix(
        [
            Source(share, dataset.tokens, len(dataset.locations), dataset.content)
            for share, dataset in zip(shares, found, strict=True)
        ]
    )
    return Dataset(
        join_summaries(dataset.read for dataset in found),
        tokens,
        join_locations([dataset.locations for dataset in found]),
        _content_of([dataset.content for dataset in found], shares),
        drawn,
        _not_drawn(found, tokens),
    )


def _not_drawn(found: Sequence[Dataset], drawn: TokenizedDataset) -> Int[np.ndarray, " n"]:
    starts = np.cumsum([0, *(len(dataset.locations) for dataset in found)])
    could_be = [dataset.tokens.origin + start for dataset, start in zip(found, starts[:-1], strict=True)]
    return np.setdiff1d(np.concatenate(could_be), drawn.origin, assume_unique=True)


def _content_of(contents: Sequence[str], shares: Sequence[Share]) -> str:
    """Of what all sources say, and of what is drawn of each."""
    facts = [
        [content, share.rows, share.weight, share.seed]
        for content, share in zip(contents, shares, strict=True)
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class Texts(NamedTuple):
    """What preferences say of which `read_dataset` has the tokens, in the order that its origin counts in."""

    preferences: list[Preference]
    skipped: dict[str, int]
    content: str


def read_texts(config: DataConfig, *, heldout: bool = False) -> Texts:
    """The preferences of all sources, one source after the other, also those that are not drawn.

    Raises:
      ValueError: naming file, line, field and reason of malformed rows.
    """
    read_at = places(config, heldout=heldout)
    found = [place.read(config) for place in read_at]
    contents = [fingerprint(map(digest, read.preferences)) for read in found]
    shares = [place.share for place in read_at if place.share is not None]
    return Texts(
        [place.label(one) for place, read in zip(read_at, found, strict=True) for one in read.preferences],
        join_summaries(read.summary for read in found).skipped,
        _content_of(contents, shares) if shares else contents[0],
    )


def read_texts_to_draw(config: DataConfig, *, heldout: bool = False) -> list[Preference]:
    """The preferences that are in the mixture if none is left out when tokens are made of them.

    Of one source alone its rankings are not expanded: all their pairs have one prompt.

    Raises:
      ValueError: as `read_texts` does.
    """
    read_at = places(config, heldout=heldout)
    shares = [place.share for place in read_at if place.share is not None]
    config = config if shares else replace(config, expand="ranking")
    found = [place.read(config).preferences for place in read_at]
    return [one for taken in (take(shares, found) if shares else found) for one in taken]


def each_text(config: DataConfig, *, heldout: bool = False) -> Iterator[Preference]:
    """What the same preferences say, one after the other; what `read_texts` refuses is left out."""
    for place in places(config, heldout=heldout):
        rows = Part(rows=place.limit)
        yield from map(
            place.label, each_preference(place.source, place.split, rows, config.expand, place.reading)
        )


def _read_in_parts(
    config: DataConfig, place: Place, tokenizer: Any, policies: _TokenPolicies, peers: Peers
) -> Dataset:
    read, locations = read_together(
        place.source,
        split=place.split,
        on_error=config.on_error,
        limit=place.limit,
        expand=config.expand,
        reading=place.reading,
        peers=peers,
    )
    tokens = tokenize_together(lambda: tokenize_part(read.preferences, tokenizer, **policies), peers)
    content = fingerprint(peers.from_all(lambda: b"".join(map(digest, read.preferences))))
    return Dataset(read.summary, tokens, locations, content)


def token_store(config: DataConfig) -> Store | None:
    """Where the settings want tokens to be kept; None where nowhere."""
    if config.token_store == "off":
        return None
    directory = config.token_store or cache_directory() / "tokens"
    return Store(Path(directory), int(config.token_store_limit * 1e9))


def tokenize_preferences(
    config: DataConfig, preferences: Sequence[Preference], tokenizer: Any
) -> TokenizedDataset:
    """Token ids as the settings want them."""
    return tokenize(preferences, tokenizer, **_token_policies(config))


class _TokenPolicies(TypedDict):
    """Arguments of `tokenize` that settings decide."""

    max_length: int
    truncation: Truncation
    end_token: EndToken
    chat_template: str | None
    template_date: str
    template_kwargs: TemplateArguments
    template_characters: int


def _token_policies(config: DataConfig) -> _TokenPolicies:
    return {
        "max_length": config.max_length,
        "truncation": config.truncation,
        "end_token": config.end_token,
        "chat_template": given_chat_template(config),
        "template_date": config.template_date,
        "template_kwargs": config.template_kwargs,
        "template_characters": config.template_characters,
    }


def given_chat_template(config: DataConfig) -> str | None:
    """The text of the chat template that the settings name; None where the tokenizer's own holds."""
    path = config.chat_template
    return None if path is None else read_template(path, name="data.chat_template")
