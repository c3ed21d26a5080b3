"""Texts of data and models on a terminal: their control characters show, and none acts."""


def show_controls(text: str) -> str:
    """The text with control characters as symbols (␛ for escape), line ends and tabs as they are."""
    return text.translate(_SYMBOLS)


_SYMBOLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_SYMBOLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
