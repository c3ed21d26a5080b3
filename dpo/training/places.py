"""Where a run's preferences stand, and how they are read there: one source, or several that are mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo.config import DataConfig
from dpo.config.sources import SourceConfig, parse_sources
from dpo.data.columns import RowReading
from dpo.data.mixing import Share
from dpo.data.preferences import Preference
from dpo.data.rows import row_reading
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

    def label(self, preference: Preference) -> Preference:
        """The preference, in a mixture under the name of this source."""
        return preference if self.share is None else preference._replace(source=self.share.name)


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
        reading = row_reading(config.row_layout, config.columns, config.ignore_columns)
        return [Place(name, source, split, limit, reading)]
    given = parse_sources(name, source)
    named = zip(given, _names(given), strict=True)
    return [
        _place_of(config, one, f"{name}[{i}]", short, split, limit) for i, (one, short) in enumerate(named)
    ]


def _place_of(
    config: DataConfig, given: SourceConfig, setting: str, name: str, split: str, limit: int | None
) -> Place:
    reading = row_reading(
        given.layout or config.row_layout,
        config.columns if given.columns is None else given.columns,
        config.ignore_columns if given.ignore_columns is None else given.ignore_columns,
        name="data" if given.layout is None and given.columns is None else setting,
    )
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
