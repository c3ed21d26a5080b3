"""The settings of a run's data: where preferences come from, and how they become token ids and rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from dpo.config.marks import BESIDE, OFF_THE_CARD, PLACE, marks
from dpo.config.ranges import check_range
from dpo.config.sources import parse_sources
from dpo.outcomes import UserError

TemplateArguments = dict[str, Any]
"""What a chat template is given by name, besides `TEMPLATE_DATA`."""

TEMPLATE_DATA = ("messages", "tools", "documents", "add_generation_prompt")
"""What a chat template gets from the data, and not from settings."""


def check_template_arguments(name: str, arguments: TemplateArguments) -> None:
    """Refuse arguments of a chat template that the data give it.

    Raises:
      ValueError: naming the setting and what is allowed.
    """
    taken = [argument for argument in arguments if argument in TEMPLATE_DATA]
    if taken:
        raise UserError(
            f"{name} has {taken[0]!r}; allowed are arguments other than {', '.join(TEMPLATE_DATA)}, which "
            "the data say"
        )
    unreadable = [one for one in arguments if not one.isidentifier() or one.lower() in _WORDS_OF_TEMPLATES]
    if unreadable:
        raise UserError(
            f"{name} has {unreadable[0]!r}; allowed are names that a template can read: letters, digits, _"
        )
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is {arguments!r}: {error}; allowed is what JSON can say") from error


_WORDS_OF_TEMPLATES = frozenset(["and", "or", "not", "in", "is", "if", "else", "true", "false", "none"])
"""Words of Jinja, which name nothing there."""


@dataclass(frozen=True)
class DataConfig:
    """Where preferences come from and how they become token ids and rows."""

    train: list[Any] | str = field(default="shipped:sentiment_train.jsonl", metadata=marks(PLACE))
    """The training preferences: a file (JSONL, Parquet, CSV and others), a directory, a hub id, or
    shipped:NAME for data that come with the package; or a list of such sources that are mixed, each with
    settings of its own, such as [{source: FILE, weight: 3}, {source: OTHER, weight: 1}] (docs/data.md)."""
    eval: list[Any] | str | None = field(default=None, metadata=marks(PLACE))
    """The held-out preferences, named like data.train; nothing is held out when not given."""
    train_split: str = "train"
    """Split of a hub data set or of a directory that is read for training."""
    eval_split: str = "test"
    """Split of a hub data set or of a directory that is read for evaluation."""
    max_train: int | None = None
    """Train on the first so many rows only, of each source; on all when not given."""
    max_eval: int | None = None
    """Evaluate on the first so many held-out rows only, of each source; on all when not given."""
    row_layout: str | None = None
    """Layout of the rows, one of those in docs/data.md, such as pair or nectar; recognised by the columns
    when not given."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other names of the layout's columns, such as {prompt: query, chosen: good}."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns not to read, even if their names (system, tools, context, images, …) say that they matter."""
    expand: Literal["ranking", "best_worst", "adjacent", "all_pairs"] = "ranking"
    """Keep a ranking whole (ranking), or turn it into pairs: best and worst (best_worst), neighbours
    (adjacent), or all (all_pairs)."""
    max_length: int = 512
    """Longest prompt plus response, in tokens; data.truncation says what happens to a longer one."""
    truncation: Literal["drop", "error", "truncate_prompt_left", "truncate_response_right"] = "drop"
    """What is done with a preference whose prompt plus response is longer than data.max_length: leave it
    out (drop), stop (error), or cut the prompt's beginning or the response's end."""
    end_token: Literal["template", "eos_only", "none"] = "template"
    """How a scored response ends: with all that the chat template puts there, with the end token alone
    (eos_only), or with nothing (none)."""
    chat_template: str | None = field(default=None, metadata=marks(PLACE))
    """File with a jinja2 chat template to use instead of the tokenizer's own."""
    template_date: str = "2024-07-26"
    """The date that chat templates are told is today (strftime_now in Llama 3's), fixed so that the same
    data always give the same tokens."""
    template_kwargs: TemplateArguments = field(default_factory=dict)
    """Arguments of the chat template, such as {enable_thinking: false}, in training, sampling and judging."""
    template_characters: int = field(default=100_000, metadata=marks(BESIDE))
    """Characters that the chat template may write for a text, beside twice those of its messages; a
    template that writes more is refused, and raising this says that it is trusted."""
    layout: Literal["padded", "packed", "shared"] = "shared"
    """How responses lie in the rows of a batch: one a row (padded), several after each other (packed), or
    packed in groups that share their prompt (shared)."""
    row_length: int | None = None
    """Length of a batch's rows, in tokens; chosen from the data's lengths when not given."""
    shuffle: bool = True
    """Shuffle the data anew in each epoch, by (seed, epoch). When false, they keep the file's order."""
    on_error: Literal["stop", "skip"] = "stop"
    """What is done with a malformed row: stop before training, or skip and count it."""
    token_store: str | None = field(default=None, metadata=marks(BESIDE, OFF_THE_CARD))
    """Directory in which tokens are kept from start to start, or off to keep none; tokens/ in DPO_CACHE
    (~/.cache/dpo) when not given."""
    token_store_limit: float = field(default=50.0, metadata=marks(BESIDE, OFF_THE_CARD))
    """Gigabytes that the token store may hold; above it, what was not used for the longest time goes. What a
    start has just made stays, however large."""

    def __post_init__(self) -> None:
        for name in ("train", "eval"):
            if isinstance(given := getattr(self, name), list):
                parse_sources(f"data.{name}", given)
            elif given == "null":  # so it reads on a command line, where the setting may be a text
                raise UserError(f"data.{name} is null; allowed is a source (./null for a file of that name)")
        check_range("data.token_store_limit", self.token_store_limit, above=0.0)
        check_range("data.max_length", self.max_length, low=2)
        check_range("data.template_characters", self.template_characters, low=1000)
        check_range("data.max_train", self.max_train, low=1)
        check_range("data.max_eval", self.max_eval, low=1)
        check_range("data.row_length", self.row_length, low=8)
        check_template_arguments("data.template_kwargs", self.template_kwargs)
        try:
            date.fromisoformat(self.template_date)
        except ValueError as error:
            raise UserError(
                f"data.template_date is {self.template_date!r}; allowed is a date as 2024-07-26"
            ) from error
