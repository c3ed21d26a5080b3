"""Data sets of the hub: their cards and files are fetched here, and made into tables by a limited process."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dpo.data.cards import check_card, unnamed_subsets
from dpo.data.table_checks import check_arrow, require_tables, say
from dpo.hub_names import named_by
from dpo.outcomes import UserError
from dpo.proxies import check_proxies
from dpo.regular_files import is_inside

_CARDS = ("README.md", ".huggingface.yaml")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_AT_A_TIME = 8
"""Downloads beside each other."""


class Card(NamedTuple):
    """What was seen of a data set's card before `datasets` followed it."""

    repository: str
    revision: str | None
    subset: str
    """As it was named; empty where none was."""
    commit: str | None = None
    """Of which it is; None where there is none, or none could be fetched."""
    error: Exception | None = None
    """What kept it from being fetched."""


def look_at_card(repository: str, revision: str | None, subset: str) -> Card:
    """Fetch the card of a data set, and check that it names files of the data set alone.

    `datasets` follows what a card says, with the user's token. What keeps the card from being fetched is left
    to `datasets` to say, which asks for the same file (`require_card`).

    Raises:
      UserError: naming the pattern that leads elsewhere, and for values that take long to look through.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    check_proxies()
    commit = None
    for name in _CARDS:
        try:
            path = Path(
                hf_hub_download(
                    repository, name, repo_type="dataset", revision=revision, token=token_for(repository)
                )
            )
        except LocalEntryNotFoundError as error:
            return Card(repository, revision, subset, error=error)
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return Card(repository, revision, subset, error=error)
        commit = path.parent.name
        check_card(path.parent)
    return Card(repository, revision, subset, commit)


def token_for(repository: str) -> bool | None:
    """For huggingface_hub: False, which is none, where only a run directory names a data set; else None."""
    return None if named_by(repository) is None else False


def say_without_token(repository: str) -> None:
    """Say before anything is asked that only a run directory names a data set, and what follows from it."""
    if (run := named_by(repository)) is not None:
        say(
            f"{repository}: the hub is asked for it without your account's token, since only {run} names it; "
            "--data DATA_SET names it on your word"
        )


def require_card(card: Card, builder: Any) -> None:
    """What `datasets` found is of the commit whose card was looked at, or of the one that is kept here.

    Raises:
      UserError: otherwise, and where it is no tables.
    """
    if builder.name == "cache":
        _require_kept(card, builder.config.name, builder.hash)
        return
    if card.error is not None:
        raise UserError(f"{card.repository}: its card could not be fetched: {card.error}") from card.error
    if card.commit not in (None, builder.hash):
        raise UserError(f"{card.repository}: it was changed while it was opened; start again")
    require_tables(card.repository, builder)


def _require_kept(card: Card, subset: str, commit: str) -> None:
    """Where the hub is not asked, `datasets` takes what it made last, of whatever revision and subset."""
    from huggingface_hub import constants

    revision = card.revision or "main"
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{card.repository.replace('/', '--')}"
    named = folder / "refs" / revision
    known = named.read_text().strip() if is_inside(revision) and named.is_file() else card.revision
    if known is None or not commit.startswith(known):
        raise UserError(
            f"{card.repository}: the hub is not asked, and what is kept here is {commit}, not revision "
            f"{revision!r}; allowed: {card.repository}@{commit}, or {revision!r} where the hub is asked"
        )
    if not card.subset and subset not in unnamed_subsets(folder / "snapshots" / commit):
        at = f"@{card.revision}" if card.revision else ""
        raise UserError(
            f"{card.repository}: the hub is not asked, and what is kept here is the subset {subset!r}, which "
            f"is not what is meant where none is named; allowed: {card.repository}:{subset}{at}"
        )


def fetch(repository: str, builder: Any) -> dict[str, list[Path]]:
    """The files of each split in the hub's cache, fetched where they are not there yet.

    Raises:
      UserError: for files of other repositories, and archives of several files.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm
    from tqdm.contrib.concurrent import thread_map

    begin = f"hf://datasets/{builder.repo_id}@{builder.hash}/"
    splits = {str(split): list(map(str, names)) for split, names in builder.config.data_files.items()}
    names = sorted({name for files in splits.values() for name in files})
    for name in names:
        if not name.startswith(begin):
            raise UserError(f"{repository}: {name[:200]!r} is to be read; allowed are files of its own")
        if name.lower().endswith(_ARCHIVES):
            raise UserError(
                f"{repository}: {os.path.basename(name)[:200]!r} is an archive; allowed are tables, "
                "compressed or not; fetch it with `hf download`, unpack it and name the files in data.train"
            )
    download = partial(
        hf_hub_download,
        builder.repo_id,
        repo_type="dataset",
        revision=builder.hash,
        token=token_for(repository),
    )
    paths = thread_map(
        lambda name: Path(download(name.removeprefix(begin))),
        names,
        max_workers=_AT_A_TIME,
        tqdm_class=tqdm,
        desc=f"{repository}: files",
        leave=False,
        disable=None,  # but on a terminal
    )
    found = dict(zip(names, paths, strict=True))
    check_arrow([path for path in paths if path.suffix == ".arrow"])
    return {split: [found[name] for name in files] for split, files in splits.items()}
