"""The recovery code: what is printed is what is read, and a typing error is noticed."""

from __future__ import annotations

import os
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import examples

import encfs_js
from encfs_js import recovery

SECRET = bytes(range(100, 120))
CODE = recovery.encode(SECRET)
DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def test_the_example_of_the_format_is_right():
    with open(os.path.join(os.path.dirname(encfs_js.__file__), "FORMAT.md"), encoding="utf-8") as file:
        [example] = re.findall(r"20 zero bytes are `([0-9A-Z-]+)`", file.read())
    assert recovery.encode(bytes(20)) == example
    assert recovery.decode(example.encode()) == bytes(20)


@given(st.binary(min_size=20, max_size=20), st.data())
@examples(200)
def test_what_is_printed_is_read_however_it_is_typed(secret, data):
    code = recovery.encode(secret)
    assert re.fullmatch(rf"[{DIGITS}]{{5}}(-[{DIGITS}]{{5}}){{6}}", code)
    typed = "".join(
        data.draw(st.sampled_from({"0": "0oO", "1": "1iIlL", "-": ["-", " ", "", "\n", "- "]}.get(c, c + c.lower())))
        for c in code
    )
    for text in (code, typed, f" {typed}\r\n"):
        assert recovery.decode(text.encode()) == secret
        assert not recovery.is_mistyped(text.encode())


def test_a_typing_error_is_noticed():
    wrong = set()
    plain = CODE.replace("-", "")
    for at, letter in enumerate(plain):
        wrong |= {plain[:at] + other + plain[at + 1 :] for other in DIGITS if other != letter}
    wrong |= {plain[:at] + plain[at + 1] + plain[at] + plain[at + 2 :] for at in range(34)} - {plain}
    assert len(wrong) > 1000
    for text in wrong:
        assert recovery.decode(text.encode()) is None
        assert recovery.is_mistyped(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"-",
        CODE[:-1].encode(),
        CODE.encode() + b"0",
        CODE.replace(CODE[0], "U").encode(),
        CODE.replace("-", "_").encode(),
        CODE.replace("-", ".").encode(),
        CODE.encode() + b"\0",
        CODE.encode() + "\N{NO-BREAK SPACE}".encode(),
        b"\xff" * 35,
        b"correct horse battery staple",
        b"x" * (1 << 20),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_code_is_none(text):
    assert recovery.decode(text) is None
    assert not recovery.is_mistyped(text)


def test_no_letter_beyond_ascii_is_a_digit():
    """Python's upper case makes ASCII letters of some: the dotless i, the long s."""
    for letter in map(chr, range(0x80, 0x10000)):
        if letter.upper() in string.ascii_uppercase:
            assert recovery.decode(("0" * 34 + letter).encode()) is None
            assert not recovery.is_mistyped(("0" * 34 + letter).encode())


@pytest.mark.parametrize("length", [0, 19, 21])
def test_a_code_stands_for_20_bytes(length):
    with pytest.raises(ValueError, match="20 bytes"):
        recovery.encode(bytes(length))
