"""The bytes on disk, purely: header, pages, sizes, and sealing and opening runs of pages (FORMAT.md section 2).

No file, no clock and no randomness that was not passed in. Nothing here logs.

Offsets: counted from the start of page 0, header included, every page holds 4064 bytes: the header takes the first 32
of page 0. So plain byte x stands at x + 32 of that row, and one divmod answers every question of place.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from itertools import repeat
from typing import Final

from cryptography.exceptions import InternalError, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from encfs_js.errors import CipherMissingError

PAGE: Final = 4096
HEADER: Final = 32
NONCE: Final = 12
PREFIX: Final = 16  # nonce, length, zero
TAG: Final = 16
ROW: Final = PAGE - PREFIX - TAG  # 4064 plain bytes a page; page 0 gives 32 of them to the header
MAGIC: Final = b"ENCFSJS1"
ZERO_PAGE: Final = bytes(PAGE)
ZERO_ROW: Final = bytes(ROW)
MAX_PAGES: Final = 2**31
MAX_PLAIN: Final = (MAX_PAGES - 1) * ROW - HEADER + ROW - 1

_HEADER = struct.Struct("<8sBBHI16s")
_AAD = struct.Struct("<32sQHH")
_LENGTH = struct.Struct("<HH")
_PREFIX = struct.Struct(f"<{NONCE}sHH{PAGE - PREFIX}x")
_FULL = _LENGTH.pack(ROW, 0)
_FEW_PAGES = 8  # up to here a nonce a page is cheaper than the 12 strided assignments (1.4 us)


class Suite(IntEnum):
    """The AEAD that seals a file, by its number in the header."""

    CHACHAPOLY = 1
    AES = 2

    @property
    def label(self) -> str:
        """NATS's name of the cipher: `chachapoly` or `aes`."""
        return self.name.lower()

    @classmethod
    def from_name(cls, name: str) -> Suite:
        """Return the suite that NATS calls `name` (chacha, chachapoly, aes; any case). Raises ValueError."""
        match name.lower():
            case "chacha" | "chachapoly":
                return cls.CHACHAPOLY
            case "aes":
                return cls.AES
            case _:
                raise ValueError(f'Unknown cipher type: "{name}"')


Aead = ChaCha20Poly1305 | AESGCM
AEADS: Final[dict[Suite, type[Aead]]] = {Suite.CHACHAPOLY: ChaCha20Poly1305, Suite.AES: AESGCM}

# What `cryptography` raises when OpenSSL is told to take FIPS algorithms only: the first where it looks for itself, the
# other where OpenSSL finds none (no FIPS provider is loaded: then it has no algorithm at all).
REFUSED: Final = (UnsupportedAlgorithm, InternalError)
NO_PROVIDER: Final = "It refuses everything: is its FIPS provider loaded? See the file that OPENSSL_CONF names."
_TAKE_AES: Final = (
    "On another host take aes for the whole store, which may be mounted: encfs-js reencrypt STORE --new-epoch --cipher aes "
    "--drop-epochs, then encfs-js key change STORE, for every slot."
)


def aead(suite: Suite, key: bytes) -> Aead:
    """Return the cipher of a suite with a key. Raises CipherMissingError when the OpenSSL of this host refuses it."""
    try:
        return AEADS[suite](key)
    except REFUSED:
        raise missing(suite) from None


def check_available(suite: Suite, hint: str = "") -> None:
    """Raise CipherMissingError when the OpenSSL of this host refuses what files of that suite need."""
    try:
        aead(suite, file_key(bytes(32), Header(suite, 1, bytes(16))))
    except (CipherMissingError, *REFUSED):
        raise missing(suite, hint) from None


def refused_suite(raw: bytes) -> Suite | None:
    """Return the suite of the file that begins with `raw` if the OpenSSL of this host refuses it."""
    try:
        suite = Header.parse(raw).suite
        check_available(suite)
    except ValueError:
        return None
    except CipherMissingError:
        return suite
    return None


def missing(suite: Suite, hint: str = "") -> CipherMissingError:
    """Make the error for a suite that the OpenSSL of this host refuses."""
    return CipherMissingError(
        f"the OpenSSL of this host refuses {suite.label} (FIPS): what is sealed with it cannot be read here",
        hint=NO_PROVIDER if suite is Suite.AES else hint or _TAKE_AES,
    )


@dataclass(frozen=True, slots=True)
class Header:
    """The first 32 bytes of a sealed file: which suite, which epoch's volume key, which file id[16]."""

    suite: Suite
    epoch: int
    file_id: bytes

    def pack(self) -> bytes:
        """Return the 32 bytes."""
        return _HEADER.pack(MAGIC, self.suite, 0, 0, self.epoch, self.file_id)

    @classmethod
    def parse(cls, raw: bytes) -> Header:
        """Read a header; `raw` may be longer. Raises ValueError for anything that version 1 does not write."""
        if len(raw) < HEADER:
            raise ValueError("short header")
        magic, suite, flags, zero, epoch, file_id = _HEADER.unpack_from(raw)
        if magic != MAGIC or flags or zero or epoch == 0:
            raise ValueError("no header of a sealed file")
        return cls(Suite(suite), epoch, file_id)


def file_key(volume_key: bytes, header: Header) -> bytes:
    """Derive the 32-byte key that seals the pages of one file."""
    info = b"encfs_js file key v1" + bytes([header.suite])
    return HKDF(SHA256(), 32, header.file_id, info).derive(volume_key)


def capacity(page: int) -> int:
    """Return how many plain bytes the page can hold."""
    return ROW if page else ROW - HEADER


def page_of(offset: int) -> tuple[int, int]:
    """Return (page, offset in its plain bytes) of plain byte `offset`."""
    page, at = divmod(offset + HEADER, ROW)
    return page, at if page else at - HEADER


def plain_start(page: int) -> int:
    """Return the plain offset of the page's first byte."""
    return page * ROW - HEADER if page else 0


def pages_for(plain_size: int) -> int:
    """Return how many pages a file of that plain size has, its end mark included."""
    return (plain_size + HEADER) // ROW + 1 if plain_size else 0


def plain_size(pages: int, last_length: int) -> int:
    """Return the plain size of a file from its page count and the length of its last page."""
    return plain_start(pages - 1) + last_length if pages else 0


def page_length(sealed: memoryview | bytes, page: int) -> int:
    """Return the length field of a sealed page as it stands there, not authenticated."""
    return int(_LENGTH.unpack_from(sealed, (0 if page else HEADER) + NONCE)[0])


class DamagedPageError(Exception):
    """A page of a run does not authenticate, or is not as long as its place demands. `page` is its index."""

    def __init__(self, page: int) -> None:
        super().__init__(page)
        self.page = page


class PageBuffer:
    """Room for `pages` sealed pages and their plain bytes, with every view that sealing and opening need.

    Made once and used for every request: fresh buffers cost page faults, and slicing costs more than AES
    (design measurement: 4.7 us a page with slices made each time, 1.2 us of that the cipher).

    `sealed` is the sealed run, `plain` its plain bytes in a row; when the run starts with page 0 they start at byte 32.
    """

    __slots__ = ("body", "nonce", "pages", "plain", "row", "sealed")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.sealed = memoryview(bytearray(pages * PAGE))
        self.plain = memoryview(bytearray(pages * ROW))
        starts = range(0, pages * PAGE, PAGE)
        self.nonce = [self.sealed[at : at + NONCE] for at in starts]
        self.body = [self.sealed[at + PREFIX : at + PAGE] for at in starts]
        self.row = [self.plain[at : at + ROW] for at in range(0, pages * ROW, ROW)]


class CheckBuffer(PageBuffer):
    """A page buffer with room for what the pages of a run authenticate besides themselves, for `FileCipher.check_run`."""

    __slots__ = ("_aads", "aad")

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._aads = bytearray(pages * _AAD.size)
        view = memoryview(self._aads)
        self.aad = [view[at : at + _AAD.size] for at in range(0, len(view), _AAD.size)]

    def prepare(self, packed: bytes, first: int, count: int, start: int, end: int) -> bool:
        """Fill in `aad` for a run whose first page is `first`. Returns whether pages start..end say they are full."""
        raw = self.sealed.obj
        assert isinstance(raw, bytearray)
        for at, byte in enumerate(_FULL, start * PAGE + NONCE):
            if raw[at : end * PAGE : PAGE] != bytes([byte]) * (end - start):
                return False
        self._aads[: count * _AAD.size] = (packed + bytes(8) + _FULL) * count
        numbers = struct.pack(f"<{count}I", *range(first, first + count))
        for j in range(4):
            self._aads[HEADER + j : count * _AAD.size : _AAD.size] = numbers[j::4]
        return True


class FileCipher:
    """The cipher of one sealed file: its header and its file key. Raises CipherMissingError.

    Holds the key inside the AEAD object only.
    """

    __slots__ = ("_aead", "header", "packed")

    def __init__(self, volume_key: bytes, header: Header) -> None:
        self.header = header
        self.packed = header.pack()
        self._aead: Aead = aead(header.suite, file_key(volume_key, header))

    def seal_run(
        self, buffer: PageBuffer, first: int, plains: list[memoryview | bytes], last_length: int, nonces: bytes
    ) -> None:
        """Seal pages `first`.. into `buffer.sealed`: one entry of `plains` a page, as long as the page's capacity.

        All but the last page are full; the last one's length is `last_length`. `nonces`: 12 random bytes a page.
        """
        count = len(plains)
        sealed, aad = buffer.sealed, _AAD.pack
        seal, packed, nonce, body = self._aead.encrypt_into, self.packed, buffer.nonce, buffer.body
        skip = 0
        if first == 0:
            length = last_length if count == 1 else ROW - HEADER
            sealed[:HEADER] = packed
            sealed[HEADER : HEADER + NONCE] = nonces[:NONCE]
            _LENGTH.pack_into(sealed, HEADER + NONCE, length, 0)
            seal(nonces[:NONCE], plains[0], aad(packed, 0, length, 0), sealed[HEADER + PREFIX : PAGE])
            if count == 1:
                return
            skip = 1
        else:
            sealed[NONCE:PREFIX] = b"\xe0\x0f\0\0"  # the slot may have held a page 0
        end = count * PAGE
        if count <= _FEW_PAGES:
            for i in range(skip, count):
                nonce[i][:] = nonces[i * NONCE : (i + 1) * NONCE]
                _LENGTH.pack_into(sealed, i * PAGE + NONCE, ROW, 0)
        else:
            # A memoryview takes no strided assignment, what it shows does.
            raw = sealed.obj
            assert isinstance(raw, bytearray)
            here, own = count - skip, nonces[skip * NONCE :]
            for j in range(NONCE):
                raw[skip * PAGE + j : end : PAGE] = own[j * here : (j + 1) * here]
            raw[skip * PAGE + NONCE : end : PAGE] = b"\xe0" * here  # 4064 = 0x0fe0
            raw[skip * PAGE + NONCE + 1 : end : PAGE] = b"\x0f" * here
            for j in range(NONCE + 2, PREFIX):  # the slots may have held damaged pages
                raw[skip * PAGE + j : end : PAGE] = bytes(here)
        final = count - 1
        for i in range(skip, final):
            seal(nonce[i], plains[i], aad(packed, first + i, ROW, 0), body[i])
        _LENGTH.pack_into(sealed, final * PAGE + NONCE, last_length, 0)
        seal(nonce[final], plains[final], aad(packed, first + final, last_length, 0), body[final])

    def open_run(self, buffer: PageBuffer, first: int, count: int, last_page: int) -> int:
        """Open the `count` pages that lie in `buffer.sealed` into `buffer.plain`; `last_page` is the file's last index.

        Every page is authenticated before anything is returned. Returns the length of the run's last page.
        Raises DamagedPageError at the first page that does not authenticate or breaks the end-mark rule.
        """
        sealed, aad = buffer.sealed, _AAD.pack
        unseal, packed, nonce, body, row = (
            self._aead.decrypt_into,
            self.packed,
            buffer.nonce,
            buffer.body,
            buffer.row,
        )
        page = first
        try:
            start = 0
            if first == 0:
                length, zero = _LENGTH.unpack_from(sealed, HEADER + NONCE)
                if sealed[:HEADER] != packed or zero or (length == ROW - HEADER) == (last_page == 0):
                    raise DamagedPageError(0)
                unseal(
                    sealed[HEADER : HEADER + NONCE],
                    sealed[HEADER + PREFIX : PAGE],
                    aad(packed, 0, length, zero),
                    row[0][HEADER:],
                )
                if length > ROW - HEADER:
                    raise DamagedPageError(0)
                if count == 1:
                    return int(length)
                start = 1
            for i in range(start, count):
                page = first + i
                length, zero = _LENGTH.unpack_from(sealed, i * PAGE + NONCE)
                if length != ROW and page != last_page:
                    raise DamagedPageError(page)
                unseal(nonce[i], body[i], aad(packed, page, length, zero), row[i])
                if zero or length > ROW or (page == last_page and length == ROW):
                    raise DamagedPageError(page)
        except InvalidTag:
            raise DamagedPageError(page) from None
        return int(length)

    def check_run(self, buffer: CheckBuffer, first: int, count: int, last_page: int) -> int:
        """Authenticate a run as `open_run` does, returning and raising the same, without keeping what the pages hold.

        For full pages no line of Python runs between two calls of the cipher: 50 ns a page on top of AES's 680, where
        `open_run` takes 170 (measured).
        """
        start, end = (1 if first == 0 else 0), min(count, last_page - first)
        if start:
            length = self.open_run(buffer, 0, 1, last_page)
        unseal, row = self._aead.decrypt_into, buffer.row[0]
        if end - start > _FEW_PAGES and buffer.prepare(self.packed, first, count, start, end):
            try:
                each = map(unseal, buffer.nonce[start:end], buffer.body[start:end], buffer.aad[start:end], repeat(row))
                deque(each, maxlen=0)
            except InvalidTag:
                pass  # one of them: which one is found below
            else:
                start, length = end, ROW
        page, packed, aad = first + start, self.packed, _AAD.pack
        prefixes = _PREFIX.iter_unpack(buffer.sealed[start * PAGE : count * PAGE])
        try:
            for (nonce, length, zero), body in zip(prefixes, buffer.body[start:count], strict=True):
                if length != ROW and page != last_page:
                    raise DamagedPageError(page)
                unseal(nonce, body, aad(packed, page, length, zero), row)
                if zero or length > ROW or (page == last_page and length == ROW):
                    raise DamagedPageError(page)
                page += 1
        except InvalidTag:
            raise DamagedPageError(page) from None
        return int(length)

    def authentic(self, sealed: memoryview | bytes, page: int) -> int | None:
        """Return the length of one sealed page if it authenticates at that index, wherever it stands; else None."""
        if len(sealed) < PAGE:
            return None
        skip = 0 if page else HEADER
        length, zero = _LENGTH.unpack_from(sealed, skip + NONCE)
        if zero or length > capacity(page) or (not page and bytes(sealed[:HEADER]) != self.packed):
            return None
        try:
            self._aead.decrypt_into(
                sealed[skip : skip + NONCE],
                sealed[skip + PREFIX : PAGE],
                _AAD.pack(self.packed, page, length, 0),
                bytearray(capacity(page)),
            )
        except InvalidTag:
            return None
        return int(length)

    def seal(self, page: int, plain: bytes, nonce: bytes) -> bytes:
        """Seal one page, `plain` being at most its capacity. For vectors and tools; files use `seal_run`."""
        buffer = PageBuffer(1)
        self.seal_run(buffer, page, [plain + bytes(capacity(page) - len(plain))], len(plain), nonce)
        return bytes(buffer.sealed)
