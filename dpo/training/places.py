"""Where a run's preferences stand, and how they are read there: one source, or several that are mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo.config import DataConfig
from dpo.config.sources import SourceConfig, parse_sources
from dpo.data.columns import RowReading
from dpo.data.mixing import Share
from dpo.data.preferences import Preference, ReadPreferences, read_preferences
from dpo.data.rows import row_reading
from dpo.data.sources import has_splits
from dpo.distribution import find_data
from dpo.outcomes import UserError


class Place(NamedTuple):
    """Where preferences are read, and how."""

    setting: str
    """The setting that names it, such as data.train or data.train[1]."""
    source: str
    split: str
    limit: int | None
    reading: RowReading
    share: Share | None = None
    """How much of it a mixture has; None where it is the only source."""

    def read(self, config: DataConfig) -> ReadPreferences:
        """All its preferences, as the settings have them read.

        Raises:
          ValueError: as `read_preferences` does.
        """
        return read_preferences(
            self.source,
            split=self.split,
            on_error=config.on_error,
            limit=self.limit,
            expand=config.expand,
            reading=self.reading,
        )

    def label(self, preference: Preference) -> Preference:
        """The preference, in a mixture under the name of this source."""
        return preference if self.share is None else preference._replace(source=self.share.name)

    def labelling(self, notice: Callable[[Preference], None]) -> Callable[[Preference], None]:
        """The same function for preferences that are not labelled yet."""
        return lambda preference: notice(self.label(preference))


def places(config: DataConfig, *, heldout: bool) -> list[Place]:
    """Of the training preferences, or of the held-out ones.

    Raises:
      ValueError: naming the setting and what is allowed.
    """
    source, split, limit = (
        (config.eval, config.eval_split, config.max_eval)
        if heldout
        else (config.train, config.train_split, config.max_train)
    )
    name = "data.eval" if heldout else "data.train"
    if source is None:
        raise UserError(f"{name} is not set; allowed: a JSONL or Parquet file, a directory or a hub id")
    if isinstance(source, str):
        if split != _SPLITS[name]:
            _require_splits(f"{name}_split", split, source)
        reading = row_reading(config.row_layout, config.columns, config.ignore_columns)
        return [Place(name, source, split, limit, reading)]
    given = parse_sources(name, source)
    asked = [one.source for one in given if one.split is None]
    if split != _SPLITS[name] and asked and not any(map(has_splits, asked)):
        _require_splits(f"{name}_split", split, asked[0])
    named = zip(given, _names(given), strict=True)
    return [
        _place_of(config, one, f"{name}[{i}]", short, split, limit) for i, (one, short) in enumerate(named)
    ]


_SPLITS = {"data.train": "train", "data.eval": "test"}
"""Splits where no setting names one."""


def _require_splits(setting: str, split: str, source: str) -> None:
    """Refuse a split of what has none: a file, or a table that was saved alone."""
    if not has_splits(source):
        raise UserError(
            f"{setting} is {split!r}, and {source} is one table without splits; allowed is to leave it out"
        )


def _place_of(
    config: DataConfig, given: SourceConfig, setting: str, name: str, split: str, limit: int | None
) -> Place:
    reading = row_reading(
        given.layout or config.row_layout,
        config.columns if given.columns is None else given.columns,
        config.ignore_columns if given.ignore_columns is None else given.ignore_columns,
        place=setting,
        place_of_layout="data" if given.layout is None else setting,
        place_of_columns="data" if given.columns is None else setting,
    )
    if given.split is not None:
        _require_splits(f"{setting}.split", given.split, given.source)
    share = Share(setting, name, given.rows, given.weight, given.seed)
    return Place(setting, given.spelling, given.split or split, limit, reading, share)


def _names(given: Sequence[SourceConfig]) -> list[str]:
    """What reports and tables call the sources: files without their folders, where that tells them apart."""
    split = ["" if one.split is None else f" ({one.split})" for one in given]
    short = [f"{_short(one.spelling)}{part}" for one, part in zip(given, split, strict=True)]
    full = [f"{one.spelling}{part}" for one, part in zip(given, split, strict=True)]
    same = Counter(short)
    names = [a if same[a] == 1 else b for a, b in zip(short, full, strict=True)]
    again = Counter(names)
    return [name if again[name] == 1 else f"{name} [{i}]" for i, name in enumerate(names)]


def _short(source: str) -> str:
    path = Path(find_data(source))
    return path.name if path.exists() else source
