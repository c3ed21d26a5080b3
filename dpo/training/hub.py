"""An export to the Hugging Face hub. Nothing here runs unless a hub id is given."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from dpo.outcomes import EnvironmentFailure, UserError
from dpo.proxies import check_proxies

_FAILURES = (httpx2.HTTPError, OSError)
"""An answer of the hub, which is both, a connection that failed, a file that could not be read."""


def check_hub_id(hub_id: str) -> None:
    """Raise unless the id is owner/name and there is a token to write with.

    Raises:
      ValueError: with what is allowed, or where a token comes from.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise UserError(f"hub_id is {hub_id!r}; allowed: OWNER/NAME")
    check_proxies()
    if get_token() is None:
        raise UserError(
            f"hub_id is {hub_id!r}, but there is no token to write there with: run `hf auth login`, or set "
            "HF_TOKEN to one with write access (https://huggingface.co/settings/tokens)"
        )


def require_repository(hub_id: str, *, private: bool) -> None:
    """See, before there is anything to upload, that the repository is there or can be made.

    Raises:
      UserError: what `check_hub_id` raises, or what the hub answered.
      EnvironmentFailure: where it cannot be reached.
    """
    check_hub_id(hub_id)
    try:
        HfApi().create_repo(hub_id, private=private, exist_ok=True)
    except _FAILURES as error:
        if _is_refusal(error):
            raise UserError(f"hub_id is {hub_id!r}, and nothing can be pushed there: {error}") from error
        raise EnvironmentFailure(f"hub_id is {hub_id!r}, and the hub cannot be reached: {error}") from error


def push_to_hub(directory: str | Path, hub_id: str, *, private: bool, message: str) -> str:
    """Upload a model directory as one commit, the repository made if it is not there; returns its address.

    Raises:
      UserError: what `check_hub_id` raises, or what the hub answered.
      EnvironmentFailure: where it cannot be reached, or fails itself.
    """
    check_hub_id(hub_id)
    api = HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        commit = api.upload_folder(folder_path=directory, repo_id=hub_id, commit_message=message)
    except _FAILURES as error:
        kind = UserError if _is_refusal(error) else EnvironmentFailure
        raise kind(f"{directory} is written, but could not be pushed to {hub_id}: {error}") from error
    return str(commit.repo_url)


def _is_refusal(error: Exception) -> bool:
    """Whether the hub answered that it will not; what is wrong on its side (500 and above) may pass."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500
