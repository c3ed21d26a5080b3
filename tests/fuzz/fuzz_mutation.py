"""Changed copies of small valid inputs: bytes, pieces, and words of the format."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

LONGEST = 8192
"""Bytes of a mutated input: what a reader does wrong it does on few bytes, and few bytes are quick."""

NUMBERS = [b"0", b"-1", b"1", b"2", b"255", b"65536", b"2147483647", b"4294967296", b"9223372036854775807"]
NUMBERS += [
    b"18446744073709551615",
    b"18446744073709551616",
    b"1e308",
    b"1e999",
    b"-0.0",
    b"NaN",
    b"9" * 5000,
]
WORDS = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\x80", "\u2028".encode(), "é".encode()]
WORDS += [b"\\ud800", b"\\u0000", b"../", b"/etc/passwd", b"\x1b[2J", b"A" * 300, b" " * 50, b"\r\n", b"\n"]
EDGES = [0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF]

Mutation = Callable[[bytearray, Random, Sequence[bytes]], bytes]


def mutate(data: bytes, random: Random, words: Sequence[bytes], others: Sequence[bytes]) -> bytes:
    """A copy with one to eight changes; `words` are the format's, pieces are taken from `others`."""
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        if random.random() < 0.08:
            data = _splice(data, random.choice(others), random)
        else:
            data = random.choice(_MUTATIONS)(bytearray(data), random, words)
        data = data[:LONGEST]
    return bytes(data)


def _flip(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _edge(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    if data:
        data[random.randrange(len(data))] = random.choice(EDGES)
    return bytes(data)


def _integer(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    """A little-endian integer of 2, 4 or 8 bytes near a border."""
    size = random.choice((2, 4, 8))
    value = random.choice(
        (0, 1, 2, 3, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1, (1 << 64) - 1)
    )
    at = random.randrange(len(data) + 1)
    data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(data)


def _delete(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    start, stop = _piece(data, random)
    del data[start:stop]
    return bytes(data)


def _repeat(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    start, stop = _piece(data, random)
    data[stop:stop] = bytes(data[start:stop]) * random.choice((1, 2, 30, 500))
    return bytes(data)


def _truncate(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    return bytes(data[: random.randrange(len(data) + 1)])


def _insert(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    at = random.randrange(len(data) + 1)
    word = random.choice(random.choice((words, WORDS, NUMBERS)))
    data[at:at] = word * random.choice((1, 1, 1, 1, 2, 40, 1500))
    return bytes(data)


def _replace(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    start, stop = _piece(data, random)
    data[start:stop] = random.choice(random.choice((words, words, WORDS, NUMBERS)))
    return bytes(data)


def _exchange(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    """One word of the format in the place of another."""
    found = [word for word in words if word in data]
    if not found:
        return bytes(data)
    return bytes(data).replace(random.choice(found), random.choice(words), random.choice((1, 1, -1)))


def _number(data: bytearray, random: Random, words: Sequence[bytes]) -> bytes:
    """Another number in the place of one."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if numbers:
        chosen = random.choice(numbers)
        data[chosen.start() : chosen.end()] = random.choice(NUMBERS)
    return bytes(data)


def _splice(data: bytes, other: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def _piece(data: bytearray, random: Random) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 1, 2, 4, 8, 16, 64)))


_MUTATIONS: list[Mutation] = [
    _flip,
    _edge,
    _integer,
    _delete,
    _repeat,
    _truncate,
    _insert,
    _replace,
    _replace,
    _exchange,
    _number,
]
