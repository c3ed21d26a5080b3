"""Which encoding the first bytes of a text show, where it is not UTF-8: shells of Windows write others."""

from __future__ import annotations

import codecs
from pathlib import Path

from dpo.outcomes import UserError

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
}
"""Which of the first four bytes are zero where ASCII begins a text without a mark (RFC 4627, section 3)."""


def encoding_problem(beginning: bytes) -> str | None:
    """What a text that begins so is written in, if it is not UTF-8, and what helps."""
    name = next((name for mark, name in _MARKS if beginning.startswith(mark)), None)
    if name is None and len(beginning) > 3:
        name = _ZEROS.get(tuple(byte == 0 for byte in beginning[:4]))
    if name is None:
        return None
    remedy = f"iconv -f {name} -t UTF-8 FILE > NEW makes it so"
    return f"its first bytes are those of {name}; allowed is UTF-8: {remedy}"


def require_utf8(path: Path, beginning: bytes, *, name: str | None = None) -> None:
    """Refuse a file, by its path or another `name`, for the encoding that its first four bytes show.

    Raises:
      UserError: naming file, encoding and what helps.
    """
    if (problem := encoding_problem(beginning[:4])) is not None:
        raise UserError(f"{name or path}: {problem}")


def require_utf8_file(path: Path, *, name: str | None = None) -> None:
    """The same of a file that is not open yet.

    Raises:
      UserError: as `require_utf8`.
      OSError: where it cannot be read.
    """
    with path.open("rb") as file:
        require_utf8(path, file.read(4), name=name)
