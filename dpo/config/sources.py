"""One of the sources that data.train or data.eval may list, as a mapping in a file or on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dpo.config.home import at_home
from dpo.config.ranges import check_range
from dpo.outcomes import UserError


@dataclass(frozen=True)
class SourceConfig:
    """A source of preferences in a mixture. What is not given is as data.* says for all of them."""

    source: str
    """File, directory, hub id or shipped:NAME."""
    subset: str | None = None
    """Configuration or data directory of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    split: str | None = None
    """Split of a hub data set or of a directory."""
    layout: str | None = None
    """Layout of the rows."""
    columns: dict[str, str] | None = None
    """Other names of the layout's columns."""
    ignore_columns: list[str] | None = None
    """Columns not to read."""
    rows: int | None = None
    """Take so many preferences, drawn by the seed; all that there are when neither this nor weight is
    given."""
    weight: float | None = None
    """Take as many preferences as this says beside the other sources with weights, drawn by the seed."""
    seed: int = 0
    """Seed of the draw."""

    @property
    def spelling(self) -> str:
        """The source with subset and revision, as one text names them."""
        subset = "" if self.subset is None else f":{self.subset}"
        return f"{self.source}{subset}{'' if self.revision is None else f'@{self.revision}'}"


_TYPES: dict[str, tuple[Any, str]] = {
    "source": (str, "a string"),
    "subset": (str, "a string"),
    "revision": (str, "a string"),
    "split": (str, "a string"),
    "layout": (str, "a string"),
    "columns": (Mapping, "a mapping"),
    "ignore_columns": (list, "a list"),
    "rows": (int, "an integer"),
    "weight": ((int, float), "a number"),
    "seed": (int, "an integer"),
}


def parse_sources(name: str, given: list[Any]) -> list[SourceConfig]:
    """The sources of a list, each a text or a mapping.

    Raises:
      ValueError: naming the setting with the place in the list, and what is allowed.
    """
    if not given:
        raise UserError(f"{name} is []; allowed is one source or more")
    return [_parse(f"{name}[{i}]", one) for i, one in enumerate(given)]


def _parse(name: str, given: Any) -> SourceConfig:
    allowed = [item.name for item in fields(SourceConfig)]
    if isinstance(given, str):
        given = {"source": given}
    if not isinstance(given, Mapping) or given.get("source") is None:
        raise UserError(f"{name} is {given!r}; allowed is a source, or a mapping of {', '.join(allowed)}")
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise UserError(f"{name}.{unknown[0]} is not a setting; allowed: {', '.join(allowed)}")
    values = {key: value for key, value in given.items() if value is not None}
    _check_types(name, values)
    check_range(f"{name}.rows", values.get("rows"), low=1)
    check_range(f"{name}.weight", values.get("weight"), above=0.0, high=1e6)
    check_range(f"{name}.seed", values.get("seed"), low=0)
    if "rows" in values and "weight" in values:
        raise UserError(
            f"{name} has rows {values['rows']} and weight {values['weight']}; allowed is one of them"
        )
    if "weight" in values:
        values["weight"] = float(values["weight"])  # 3 and 3.0 are one mixture
    return SourceConfig(**{**values, "source": at_home(values["source"])})


def _check_types(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        kind, words = _TYPES[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{name}.{key} is {value!r}; allowed is {words}")
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        if not all(isinstance(one, str) for one in inner):
            raise UserError(f"{name}.{key} is {value!r}; allowed is {words} of names")


def spellings(given: str | list[Any]) -> list[str]:
    """Every source that is named, one text each."""
    return [given] if isinstance(given, str) else [one.spelling for one in parse_sources("data", given)]


def show_source(given: str | list[Any] | None) -> str:
    """A source, or the names of several, for people."""
    return "None" if given is None else ", ".join(spellings(given))
