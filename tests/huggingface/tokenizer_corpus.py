"""Texts on which tokenizers come apart: written for this, each line for a reason."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

TEXTS = [
    # digits, and white space before them
    "three:\n\n1. Apples\n2. Pears\n10. Plums",
    "Total:  42",
    "1234567890 12,345.67 3.14159 007 2026-11-27T09:15:00Z",
    "a1b22c333d4444 5e-10 0xFF00 1/2 50% £3.50 $1,000,000",
    "²³ ½ Ⅷ ١٢٣ ४५६ 一二三 ①②③",
    "v1.2.3\t4\n5\r\n6",
    # lists and paragraphs
    "Here are some tips:\n\n- First,\n- second;\n\n\n* third.\n\n\n\n1) fourth\n\t- nested\n",
    "\n\n\nThree line ends first",
    "and last\n\n\n",
    "# Title\n\nText.\n\n## Part 2\n\n> quoted\n\n---\n\n| a | b |\n|---|---|\n| 1 | 2 |",
    # spaces, tabs, line ends
    " one space first",
    "  two spaces first",
    "one  two   three    four     five",
    "trailing spaces   ",
    "\ttab first",
    "\t\ttwo tabs\t\tinside\t",
    "CRLF\r\nafter\r\n\r\nempty\rlone",
    " \n \n  \n mixed \t \n\t x",
    "no-break\u00a0space, narrow\u202fspace, ideographic\u3000space, zero\u200bwidth, thin\u2009space",
    "line\u2028separator paragraph\u2029separator next\u0085line \x0bvertical \x0cfeed",
    # contractions and quotation marks
    "I'm you're he's it'd we'll they've don't DON'T I'M WE'LL can\u2019t 'tis 'quoted' ''twice''",
    "\u201cCurly\u201d \u2018quotes\u2019 \u00abguillemets\u00bb \u2014 dashes \u2013 \u2026 ellipsis...",
    # code
    "def f(x: int) -> int:\n    if x > 10:\n        return x**2  # sq\n    return [i for i in range(x)]\n",
    '{"key": [1, 2.5, null, true], "text": "a\\nb"}',
    "for (int i = 0; i < 10; ++i) { a[i] += b[i] << 2; } /* ok */ // done",
    "SELECT COUNT(*) FROM t WHERE x <> 'y' AND z >= 3;",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.com C:\\dir\\file.txt",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case XMLHttpRequest iPhone15Pro",
    "$\\frac{a}{b} = \\sum_{i=1}^{n} x_i^2$ ~ ` | ^ + < = >",
    "<html><b>bold</b>&nbsp;&amp;</html> !!! ??? ... ,,, ;;; ((())) [[]] {{}}",
    # scripts
    "naïve café Zürich Straße Ærø łódź İstanbul ſ K",
    "e\u0301 decomposed, \u00e9 composed; n\u0303 \u00f1",
    "Привет, мир! Ёлка 2026 года.",
    "Γειά σου Κόσμε",
    "你好，世界！今天是2026年11月27日。",
    "日本語のテキスト、カタカナ、ひらがな。",
    "안녕하세요 세계 여러분",
    "नमस्ते दुनिया, क्या हाल है? हिन्दी में १२३",
    "বাংলা ভাষা தமிழ் ไทยภาษา ခရီး",
    "مرحبا بالعالم، كيف الحال؟ עברית שלום",
    # symbols
    "😀😃 👍🏽 👩\u200d👩\u200d👧\u200d👦 🇩🇪🇫🇷 ❤\ufe0f 🏳\ufe0f\u200d🌈 ☃ ✓ → ∑ ≈ ≠ ∞ °C №",
    "emoji between😀words and 5️⃣ keycaps",
    "\u200f\u202eright to left marks\u202c \ufeffbyte order mark \ufffd replaced",
    "\U0001d54f\U0001d4ea mathematical, \U00020bb7 rare, \ue000 private",
    "a" * 60 + " " + "ab" * 30,
    "x",
    " ",
    "  ",
    "\n",
    "!",
    # special tokens inside a text
    "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n 3.<|im_end|>\n",
    "<start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n 3.<end_of_turn>\n",
    "<bos> hello <eos><pad> <unk> <s> </s> <|endoftext|> <|file_separator|> [INST] hi [/INST]",
]


def shipped_rows(count: int) -> list[str]:
    """Responses of the preferences that come with the project."""
    path = Path(__file__).parents[2] / "data" / "sentiment_train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [text for line in lines for text in json.loads(line)["responses"]][:count]


def digest(ids: list[list[int]]) -> str:
    """Of the token ids of many texts, where the ids themselves would be long."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def real_rows(directory: Path, count: int) -> list[str]:
    """Prompts and responses of people, from the preferences outside the repository."""
    texts: list[str] = []
    lines = (directory / "data" / "pairs_train.jsonl").read_text(encoding="utf-8").split("\n")
    for line in filter(None, lines[:count]):
        row = json.loads(line)
        texts += [_text(row[name]) for name in ("prompt", "chosen", "rejected") if name in row]
        if len(texts) >= count:
            break
    return texts[:count]


def _text(value: str | list[dict[str, str]]) -> str:
    return value if isinstance(value, str) else "\n\n".join(message["content"] for message in value)
