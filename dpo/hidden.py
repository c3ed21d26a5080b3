"""What the environment knows and nobody else may: tokens and passwords of proxies, cut from what is said.

A key goes into a header, and a password to a proxy, by libraries that may quote them in an error, a warning
or a log. So `cut_secrets` is asked about every text that is printed (`dpo.terminal`), that an error says
(`dpo.outcomes`) and that is written of a server (`dpo.judging.keys`).
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from urllib.parse import quote, unquote

SHORTEST_SECRET = 5
"""Characters: a shorter key is a placeholder, and cutting it out would take single letters from answers."""
SHORTEST_EVERYWHERE = 8
"""Characters of what is cut out of every text, of data too: servers without keys are given EMPTY or dummy."""
CUT = "[key]"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")
"""Variables whose value is a secret."""
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
"""Variables with the address of a proxy, in which a user and a password may stand."""
_ADDRESSES = (*PROXIES, "PIP_PROXY", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "HF_ENDPOINT")


def cut_secrets(text: str) -> str:
    """The text without the tokens, the users and the passwords that the environment has."""
    given = tuple(os.environ.get(name, "") for name in (*TOKENS, *_ADDRESSES))
    pattern = _secrets(given) if any(given) else None
    return pattern.sub(CUT, text) if pattern else text


@lru_cache(maxsize=4)
def _secrets(given: tuple[str, ...]) -> re.Pattern[str] | None:
    """An expression that finds each secret, also as a URL or JSON may spell it; the longest first."""
    found = {value.strip() for value in given[: len(TOKENS)]}
    for address in " ".join(given[len(TOKENS) :]).split():
        user, at, _ = address.rpartition("://")[2].rpartition("@")
        if at:  # behind the last @ is the host, whatever stands in a password
            found |= {user, user.partition(":")[2]}
    known = {one for one in found if len(one) >= SHORTEST_EVERYWHERE}
    spelled = {
        spelling
        for one in known
        for spelling in (one, unquote(one), quote(unquote(one), safe=""), quote(unquote(one), safe=":"))
    }
    longest_first = sorted(spelled, key=lambda one: (-len(one), one))
    return re.compile("|".join(map(re.escape, longest_first))) if spelled else None
