"""Repositories of the hub that a run directory names, and nobody on the command line.

A run directory may be somebody else's, and its config.yaml may name any repository. So for it nothing is
asked of the hub with the account's token: a model comes from the hub's cache or is refused, as an adapter's
base is. A data set is fetched without the token, which is said before. What the command line, a file of
settings or a call of Python names is the user's own word, and is fetched as it always is.
"""

from __future__ import annotations

_NAMED_BY: dict[str, str] = {}
"""Of each repository, the file that names it."""
_OWN: set[str] = set()
"""Repositories that the user named."""


def note_named_by(path: str, *sources: str | None) -> None:
    """A file of a run directory names these sources of a model or of data."""
    for repository in map(_repository, filter(None, sources)):
        _NAMED_BY.setdefault(repository, path)


def note_own_word(*sources: str | None) -> None:
    """The user names these sources."""
    _OWN.update(map(_repository, filter(None, sources)))


def named_by(source: str) -> str | None:
    """The file of a run directory that names a repository where the user does not."""
    repository = _repository(source)
    return None if repository in _OWN else _NAMED_BY.get(repository)


def forget() -> None:
    """Begin anew, as every command does."""
    _NAMED_BY.clear()
    _OWN.clear()


def _repository(source: str) -> str:
    """OWNER/NAME of "ADAPTER on OWNER/NAME@REVISION" and of "OWNER/NAME:SUBSET@REVISION"."""
    return source.rpartition(" on ")[2].partition("@")[0].partition(":")[0]
