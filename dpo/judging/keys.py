"""The key of an endpoint: checked before it is sent, and cut out of everything that is written or shown."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dpo.hidden import CUT, SHORTEST_SECRET, cut_secrets
from dpo.outcomes import UserError

_LOOPBACK = re.compile(r"localhost|.*\.localhost|127(\.\d+){3}|::1")


class Key(NamedTuple):
    """What is sent to an endpoint to be let in; None where nothing is."""

    value: str | None
    variable: str
    """The environment variable that it comes from."""

    @property
    def headers(self) -> dict[str, str]:
        """The only place that the key goes to."""
        return {} if self.value is None else {"Authorization": f"Bearer {self.value}"}

    def cut_from(self, text: str) -> str:
        """The text without the key, however JSON or a URL may spell its characters, and without others."""
        text = cut_secrets(text)
        if self.value is None or len(self.value) < SHORTEST_SECRET:
            return text
        return re.sub("".join(map(_spellings, self.value)), CUT, text)

    def cut_from_value(self, value: Any) -> Any:
        """The same for anything that JSON can hold."""
        if isinstance(value, dict):
            return {self.cut_from(name): self.cut_from_value(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.cut_from_value(inner) for inner in value]
        return self.cut_from(value) if isinstance(value, str) else value

    def warning(self, url: str) -> str | None:
        """What to say of a key that travels where others can read it."""
        address = urlsplit(url)
        if self.value is None or address.scheme != "http" or _LOOPBACK.fullmatch(address.hostname or ""):
            return None
        return (
            f"! the key in {self.variable} goes to {address.hostname} over http://, where others on the way "
            "can read it: use https://, or unset it where the server needs none"
        )


def _spellings(character: str) -> str:
    code = ord(character)
    return rf"(?:\\?{re.escape(character)}|(?i:%{code:02x}|\\u{code:04x}))"


def read_key(variable: str) -> Key:
    """The key in an environment variable, without white space around it.

    Raises:
      ValueError: for one with a character that no header can carry; it is not shown.
    """
    value = os.environ.get(variable, "").strip()
    wrong = re.search(r"[^\x21-\x7e]", value)
    if wrong is not None:
        what = "a line break" if wrong[0] in "\r\n" else "a space" if wrong[0] == " " else repr(wrong[0])
        raise UserError(
            f"the key in the environment variable {variable} has {what} after {wrong.start()} characters; "
            "allowed are visible ASCII characters: set it anew (it was sent nowhere)"
        )
    return Key(value or None, variable)
