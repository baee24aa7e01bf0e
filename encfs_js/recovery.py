"""The recovery code: 160 random bits as text that a person can keep on paper and type (FORMAT.md section 3).

35 characters of Crockford's Base32 (crockford.com/base32.html) in 7 groups of 5: 32 for the bits, 3 for a checksum of them.
"""

from __future__ import annotations

import hashlib
from typing import Final

SIZE: Final = 20  # bytes
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_READ_AS: Final = str.maketrans("OIL", "011", "- \t\r\n")
_LENGTH: Final = 35
_GROUP: Final = 5
_CHECK_BITS: Final = 15


def encode(secret: bytes) -> str:
    """Return the code of 20 bytes, in groups of five that hyphens part. Raises ValueError for another length."""
    if len(secret) != SIZE:
        raise ValueError(f"a recovery code stands for {SIZE} bytes")
    number = int.from_bytes(secret, "big") << _CHECK_BITS | _checksum(secret)
    text = "".join(_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))
    return "-".join(text[at : at + _GROUP] for at in range(0, _LENGTH, _GROUP))


def decode(text: bytes) -> bytes | None:
    """Return the 20 bytes of a code; None for any other text, and for a code with a typing error.

    Upper or lower case; hyphens and white space do not count; O reads as 0, I and L as 1.
    """
    number = _number(text)
    if number is None:
        return None
    secret = (number >> _CHECK_BITS).to_bytes(SIZE, "big")
    return secret if number & (1 << _CHECK_BITS) - 1 == _checksum(secret) else None


def is_mistyped(text: bytes) -> bool:
    """Tell whether a text has the form of a code, and not its checksum."""
    return _number(text) is not None and decode(text) is None


def _number(text: bytes) -> int | None:
    # Not one of the letters beyond ASCII that become an ASCII one in upper case.
    plain = text.decode("ascii", "replace").upper().translate(_READ_AS)
    if len(plain) != _LENGTH or not set(plain) <= set(_ALPHABET):
        return None
    number = 0
    for letter in plain:
        number = number << 5 | _ALPHABET.index(letter)
    return number


def _checksum(secret: bytes) -> int:
    return int.from_bytes(hashlib.sha256(secret).digest()[:2], "big") >> 1
