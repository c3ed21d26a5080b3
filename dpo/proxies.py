"""The environment's proxies, looked at before the first request: a wrong one is named and not shown."""

from __future__ import annotations

import importlib.util
import os
from urllib.parse import urlsplit

from dpo.hidden import PROXIES
from dpo.outcomes import UserError


def check_proxies() -> None:
    """Look at every proxy that the environment names, by which requests would go.

    The libraries that send requests end with an error of Python at a wrong one, after responses were sampled.

    Raises:
      UserError: naming the variable, what is wrong with it, and what is allowed.
    """
    for variable in PROXIES:
        if (value := os.environ.get(variable, "")) and (problem := _problem_of_proxy(value)):
            raise UserError(
                f"the environment variable {variable} {problem}; allowed: http://HOST:PORT or "
                "https://HOST:PORT, with user:password@ before the host where it wants them, or unset it"
            )


def _problem_of_proxy(value: str) -> str | None:
    if not value.isprintable() or " " in value:
        return "has a space or a character that cannot be printed"
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        has_host, _ = bool(parts.hostname), parts.port
    except ValueError:
        return "is no address"
    schemes = ["http", "https"]
    if importlib.util.find_spec("socksio") is not None:
        schemes += ["socks5", "socks5h"]
    if parts.scheme not in schemes:
        return f"does not begin with {', '.join(f'{one}://' for one in schemes)}"
    return None if has_host else "names no host"
