"""The check of an address among the settings: what stands in it is written down, so no secret may."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from dpo.outcomes import UserError

_USER = re.compile(r"^(https?://)?.*@", re.DOTALL)
"""What may be one, where the address is none too: up to the last @, whatever stands before it."""


def check_address(key: str, value: str) -> None:
    """Raise for anything but an http:// or https:// address without user, password, query and fragment.

    A user, a password, a query and a fragment are never shown.
    """
    shown = re.split("[?#]", _USER.sub(r"\1[user]@", value))[0]
    try:
        parts = urlsplit(value)
        has_host, _ = bool(parts.hostname), parts.port
    except ValueError as error:
        raise UserError(f"{key} is {shown!r}, which is no address; allowed: http:// or https://") from error
    if parts.scheme not in ("http", "https") or not has_host:
        raise UserError(f"{key} is {shown!r}; allowed: http:// or https:// addresses")
    if "@" in parts.netloc:
        raise UserError(
            f"{key} is {shown!r}, with a user or a password in it, which would stand in every verdict and "
            "report; allowed: the address without them, and a key in the environment variable that "
            "endpoint.api_key_env names"
        )
    if parts.query or parts.fragment:
        raise UserError(
            f"{key} is {shown!r} with a query (?…) or a fragment (#…); allowed: the address up to and "
            "without /chat/completions, and a key in the environment variable that endpoint.api_key_env names"
        )
