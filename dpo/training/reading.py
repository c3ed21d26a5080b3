"""A run's preferences: where the settings say they are, read and made into token ids, their texts apart.

Training, evaluation, planning and inspection read the same here, so that all see the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo.config import DataConfig
from dpo.data.chunks import TokenJob
from dpo.data.columns import RowReading
from dpo.data.parts import ALONE, Peers, read_together, tokenize_together
from dpo.data.preferences import (
    Preference,
    ReadPreferences,
    ReadSummary,
    digest,
    each_preference,
    fingerprint,
    read_preferences,
)
from dpo.data.prepared import Prepared, Store, prepare
from dpo.data.rows import row_reading
from dpo.data.sources import Part
from dpo.data.templates import read_template
from dpo.data.tokenization import tokenize, tokenize_part
from dpo.data.tokenized import TokenizedDataset
from dpo.huggingface.embedded import cache_directory
from dpo.outcomes import UserError
from dpo.parallel.distributed import from_all, on_main


class Dataset(NamedTuple):
    """Preferences as token ids, and what is known of their rows; `read_texts` has what these say."""

    read: ReadSummary
    tokens: TokenizedDataset
    locations: Sequence[str]
    """Where every preference stands that was read; `tokens.origin` counts in these."""
    content: str
    """SHA-256 of what the preferences say, wherever they stand and whoever read them."""

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
) -> Dataset:
    """The tokens of the training preferences, or of the held-out ones, from the store where it has them.

    Several `peers` of one host make them once; without a store each of them makes a part.

    Raises:
      ValueError: naming file, line, field and reason of malformed rows, or a chat template that is not there.
    """
    place = _place(config, heldout=heldout)
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


def read_texts(config: DataConfig, *, heldout: bool = False) -> ReadPreferences:
    """What the preferences say of which `read_dataset` has the tokens, in the same order.

    Raises:
      ValueError: naming file, line, field and reason of malformed rows.
    """
    place = _place(config, heldout=heldout)
    return read_preferences(
        place.source,
        split=place.split,
        on_error=config.on_error,
        limit=place.limit,
        expand=config.expand,
        reading=place.reading,
    )


def each_text(config: DataConfig, *, heldout: bool = False) -> Iterator[Preference]:
    """What the same preferences say, one after the other; what `read_texts` refuses is left out."""
    place = _place(config, heldout=heldout)
    rows = Part(rows=place.limit)
    return each_preference(place.source, place.split, rows, config.expand, place.reading)


class _Place(NamedTuple):
    """Where preferences are read, and how."""

    source: str
    split: str
    limit: int | None
    reading: RowReading


def _place(config: DataConfig, *, heldout: bool) -> _Place:
    source, split, limit = (
        (config.eval, config.eval_split, config.max_eval)
        if heldout
        else (config.train, config.train_split, config.max_train)
    )
    if source is None:
        raise UserError("data.eval is not set; allowed: a JSONL or Parquet file, a directory or a hub id")
    reading = row_reading(config.row_layout, config.columns, config.ignore_columns)
    return _Place(source, split, limit, reading)


def _read_in_parts(
    config: DataConfig, place: _Place, tokenizer: Any, policies: dict[str, Any], peers: Peers
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


def _token_policies(config: DataConfig) -> dict[str, Any]:
    return {
        "max_length": config.max_length,
        "truncation": config.truncation,
        "end_token": config.end_token,
        "chat_template": given_chat_template(config),
        "template_date": config.template_date,
        "template_kwargs": config.template_kwargs,
    }


def given_chat_template(config: DataConfig) -> str | None:
    """The text of the chat template that the settings name; None where the tokenizer's own holds."""
    path = config.chat_template
    return None if path is None else read_template(path, name="data.chat_template")
