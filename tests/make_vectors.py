"""Make the golden vectors in tests/vectors/sealed: `python tests/make_vectors.py`. The result is the same every time.

The pages are sealed here with `cryptography` and by FORMAT.md, not with the package: what the vectors say must not
depend on the code that they test. A change in a vector is a change of the format.

A vector is a JSON object: `why` (what it shows), `volume_keys` (by epoch, hex), `clean` (how the last run stopped),
`expect`, `file` (base64 of zlib), and by the outcome:

    success     plain_size, plain_sha256
    integrity   page: the first that a reader must refuse, reading from the start
    trimmed     sealed_before, sealed_after, plain_size, plain_sha256: what the crash rule makes of it; page: what a
                reader must refuse without an unclean stop. `plain_sha256` is null where a damaged page stays.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from decoder import PAGE, SUITES, capacity, hkdf

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DIRECTORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vectors", "sealed")
NAMES = {1: "chachapoly", 2: "aes"}
VOLUME_KEYS = {epoch: hashlib.sha256(b"vector volume key %d" % epoch).digest() for epoch in (1, 2)}
UNKNOWN_KEY = hashlib.sha256(b"vector volume key of an epoch that the keyring lacks").digest()
ID = hashlib.sha256(b"vector file id").digest()[:16]
OTHER_ID = hashlib.sha256(b"vector file id of another file").digest()[:16]
ZERO = bytes(PAGE)


def header(
    suite: int,
    epoch: int = 1,
    file_id: bytes = ID,
    *,
    magic: bytes = b"ENCFSJS1",
    flags: int = 0,
    zero: int = 0,
) -> bytes:
    return struct.pack("<8sBBHI16s", magic, suite, flags, zero, epoch, file_id)


def nonce(head: bytes, page: int, version: int) -> bytes:
    return hashlib.sha256(b"vector nonce" + head + struct.pack("<QI", page, version)).digest()[:12]


def seal(
    head: bytes,
    page: int,
    plain: bytes,
    *,
    version: int = 0,
    length: int | None = None,
    zero: int = 0,
    bound: bytes | None = None,
    key: bytes | None = None,
    suite: int | None = None,
    padding: bytes = b"",
) -> bytes:
    """Seal one page. The keywords are what a writer that breaks the format does otherwise than it should."""
    length = len(plain) if length is None else length
    if bound is None:
        bound = head + struct.pack("<QHH", page, length, zero)
    if key is None:
        volume_key = VOLUME_KEYS.get(struct.unpack_from("<I", head, 12)[0], UNKNOWN_KEY)
        key = hkdf(volume_key, b"encfs_js file key v1" + head[8:9], salt=head[16:32])
    used = nonce(head, page, version)
    body = (plain + padding).ljust(capacity(page), b"\0")
    sealed = SUITES[head[8] if suite is None else suite](key).encrypt(used, body, bound)
    return (b"" if page else head) + used + struct.pack("<HH", length, zero) + sealed


def text(size: int, seed: str = "") -> bytes:
    return hashlib.shake_128(f"vector text {seed}".encode()).digest(size)


def split(plain: bytes) -> list[bytes]:
    """Cut a plain text into pages, the end mark included."""
    pages, at = [], 0
    while at < len(plain) or (pages and len(pages[-1]) == capacity(len(pages) - 1)):
        pages.append(plain[at : at + capacity(len(pages))])
        at += len(pages[-1])
    return pages


def seal_all(head: bytes, plain: bytes, version: int = 0) -> list[bytes]:
    return [seal(head, page, part, version=version) for page, part in enumerate(split(plain))]


def flip(sealed: bytes, at: int, bit: int = 0) -> bytes:
    return sealed[:at] + bytes([sealed[at] ^ 1 << bit]) + sealed[at + 1 :]


@dataclass(frozen=True)
class Vector:
    name: str
    why: str
    sealed: bytes
    expect: str
    page: int | None = None
    plain: bytes | None = None
    plain_size: int | None = None
    sealed_after: int | None = None
    clean: bool = True

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "why": self.why,
            "volume_keys": {str(epoch): key.hex() for epoch, key in VOLUME_KEYS.items()},
            "clean": self.clean,
            "expect": self.expect,
        }
        if self.page is not None:
            found["page"] = self.page
        if self.expect == "trimmed":
            found["sealed_before"] = len(self.sealed)
            found["sealed_after"] = self.sealed_after
        if self.expect != "integrity":
            found["plain_size"] = self.plain_size if self.plain is None else len(self.plain)
            found["plain_sha256"] = None if self.plain is None else hashlib.sha256(self.plain).hexdigest()
        return found | {"file": base64.b64encode(zlib.compress(self.sealed, 9)).decode("ascii")}


def join(pages: Sequence[bytes]) -> bytes:
    return b"".join(pages)


def good(suite: int) -> Iterator[Vector]:
    head, name = header(suite), NAMES[suite]
    for size in (1, 4031, 4032, 4033, 8095, 8096):
        plain = text(size)
        yield Vector(f"{name}-{size}", f"{size} plain bytes", join(seal_all(head, plain)), "success", plain=plain)
    plain = text(5000)
    other = header(suite, epoch=2)
    yield Vector(f"{name}-epoch-2", "the second volume key", join(seal_all(other, plain)), "success", plain=plain)
    yield Vector(
        f"{name}-zeros",
        "a file that grew: sealed zeros",
        join(seal_all(head, bytes(4100))),
        "success",
        plain=bytes(4100),
    )
    padded = seal(head, 0, plain[:100], padding=b"behind the length")
    yield Vector(f"{name}-behind-length", "what lies behind length is ignored", padded, "success", plain=plain[:100])
    old, new = text(5000, "old"), text(5000, "new")
    mixed = join([seal_all(head, new, 1)[0], seal_all(head, old)[1]])
    yield Vector(
        f"{name}-older-page",
        "an older copy of one page is accepted: not bound to a point in time",
        mixed,
        "success",
        plain=new[:4032] + old[4032:],
    )
    shorter = join([seal_all(head, new, 1)[0], seal_all(head, old[:4500])[1]])
    yield Vector(
        f"{name}-older-last-page",
        "an older, shorter copy of the last page is accepted",
        shorter,
        "success",
        plain=new[:4032] + old[4032:4500],
    )


def bad_headers(suite: int) -> Iterator[Vector]:
    name, plain = NAMES[suite], text(700)

    def refused(what: str, why: str, sealed: bytes, page: int = 0) -> Vector:
        return Vector(f"{name}-{what}", why, sealed, "integrity", page)

    head = header(suite)
    sealed = seal(head, 0, plain)
    body = sealed[32:]
    for what, why, other in (
        ("sealed-unknown-suite-0", "suite 0, authentic with it", header(0)),
        ("sealed-unknown-suite-3", "suite 3, authentic with it", header(3)),
        ("sealed-flags", "a flag, authentic with it", header(suite, flags=1)),
        ("sealed-header-zero", "the header's zero field, authentic with it", header(suite, zero=1)),
        ("sealed-epoch-0", "epoch 0, authentic with it", header(suite, epoch=0)),
        ("sealed-epoch-3", "an epoch that the keyring lacks", header(suite, epoch=3)),
        ("sealed-magic", "another magic, authentic with it", header(suite, magic=b"ENCFSJS2")),
    ):
        yield refused(what, why, seal(other, 0, plain, suite=suite))
    for what, why, other in (
        ("other-suite", "the header names the other suite", header(3 - suite)),
        ("other-epoch", "the header names the other epoch", header(suite, epoch=2)),
        ("other-id", "the header of another file", header(suite, file_id=OTHER_ID)),
        ("lower-magic", "the magic in lower case", header(suite, magic=b"encfsjs1")),
        ("flags", "a flag set afterwards", header(suite, flags=0x80)),
        ("header-zero", "the header's zero field set afterwards", header(suite, zero=0x8000)),
    ):
        yield refused(what, why, other + body)
    yield refused("header-zeros", "the header is zeros, the page is not", bytes(32) + body)
    pages = seal_all(head, text(5000))
    yield refused(
        "header-of-another",
        "two pages, the header of another file",
        header(suite, file_id=OTHER_ID) + join(pages)[32:],
    )


def bad_pages(suite: int) -> Iterator[Vector]:
    head, name, plain = header(suite), NAMES[suite], text(4500)
    other = header(suite, file_id=OTHER_ID)
    full, last = seal_all(head, plain)

    def refused(what: str, why: str, pages: Sequence[bytes], page: int) -> Vector:
        return Vector(f"{name}-{what}", why, join(pages), "integrity", page)

    def second(what: str, why: str, **wrong: Any) -> Vector:
        return refused(what, why, [full, seal(head, 1, plain[4032:], **wrong)], 1)

    part = len(plain) - 4032
    yield second("bound-to-index-2", "page 1 is bound to index 2", bound=head + struct.pack("<QHH", 2, part, 0))
    yield second("bound-to-other-header", "bound to another header", bound=other + struct.pack("<QHH", 1, part, 0))
    yield second("bound-to-other-length", "bound to another length", bound=head + struct.pack("<QHH", 1, part + 1, 0))
    yield second("big-endian", "a big-endian index", bound=head + struct.pack(">Q", 1) + struct.pack("<HH", part, 0))
    yield second("bound-to-nothing", "no associated data", bound=b"")
    yield second("volume-key", "sealed with the volume key itself", key=VOLUME_KEYS[1])
    yield second(
        "info-without-suite",
        "a file key derived without the suite",
        key=hkdf(VOLUME_KEYS[1], b"encfs_js file key v1", salt=ID),
    )
    yield second("sealed-zero-field", "the page's zero field, authentic with it", zero=1)
    yield second("too-long-4065", "length beyond the capacity, authentic", length=4065, padding=text(4064 - part))
    yield second("too-long-65535", "the greatest length, authentic", length=65535)
    yield refused("too-long-4033", "length beyond page 0's capacity", [seal(head, 0, text(4032), length=4033)], 0)
    yield refused("too-long-4064", "page 0 has less room than the others", [seal(head, 0, text(4032), length=4064)], 0)
    yield refused("epochs-mixed", "page 1 is of epoch 2", [full, seal(header(suite, epoch=2), 1, plain[4032:])], 1)
    yield refused("page-of-another", "page 1 of another file", [full, seal(other, 1, plain[4032:])], 1)
    for what, at in (
        ("nonce", 0),
        ("length", 12),
        ("zero", 14),
        ("text", 16),
        ("behind-length", 4000),
        ("tag", 4095),
    ):
        yield refused(f"flip-{what}-1", f"a bit of page 1: {what}", [full, flip(last, at, at % 8)], 1)
        at_0 = at if at == 4095 else at + 32
        yield refused(f"flip-{what}-0", f"a bit of page 0: {what}", [flip(full, at_0, at % 8), last], 0)


def bad_files(suite: int) -> Iterator[Vector]:
    head, name = header(suite), NAMES[suite]
    plain = text(8300)
    a, b, c = seal_all(head, plain)
    mark = seal(head, 2, b"")

    def refused(what: str, why: str, pages: Sequence[bytes], page: int) -> Vector:
        return Vector(f"{name}-{what}", why, join(pages), "integrity", page)

    yield refused("swap", "pages 1 and 2 changed places", [a, c, b], 1)
    yield refused("page-twice", "page 1 twice", [a, b, b], 2)
    yield refused("page-missing", "page 1 is missing", [a, c], 1)
    yield refused("no-mark-0", "one full page, no end mark", [seal(head, 0, plain[:4032])], 1)
    yield refused("no-mark-1", "two full pages, no end mark", [a, b], 2)
    yield refused("short-0", "page 0 is short and not the last", [seal(head, 0, plain[:4031]), b, mark], 0)
    yield refused("short-1", "page 1 is short and not the last", [a, seal(head, 1, plain[:4063]), mark], 1)
    yield refused("empty-0", "page 0 is empty and not the last", [seal(head, 0, b""), seal(head, 1, b"")], 0)
    yield refused("zero-page-0", "page 0 is zeros", [ZERO, b, c], 0)
    yield refused("zero-page-1", "page 1 is zeros", [a, ZERO, c], 1)
    yield refused("zero-page-2", "zeros behind a full page", [a, b, ZERO], 2)
    yield refused("zero-alone", "nothing but a page of zeros", [ZERO], 0)
    yield refused("zero-behind-end", "zeros behind the end mark", [a, seal(head, 1, b""), ZERO], 1)
    yield refused("after-end", "a page behind a short one", [a, seal(head, 1, plain[4032:5000]), c], 1)
    for size in (1, 8, 31, 32, 47, 48, 63, 64, 2048, 4095):
        yield refused(f"cut-0-{size}", f"page 0 is cut after {size} bytes", [seal(head, 0, plain[:50])[:size]], 0)
    for size in (1, 15, 16, 31, 32, 4095):
        yield refused(f"cut-1-{size}", f"page 1 is cut after {size} bytes", [a, b[:size]], 1)
    yield refused("cut-behind-end", "a cut page behind a short one", [a, seal(head, 1, plain[4032:5000]), c[:9]], 1)
    yield refused("byte-more", "one byte behind the end", [seal(head, 0, plain[:50]), b"\0"], 0)


def unclean(suite: int) -> Iterator[Vector]:
    head, name = header(suite), NAMES[suite]
    plain = text(8300)
    a, b, c = seal_all(head, plain)
    short_1 = seal(head, 1, plain[4032:5000])
    empty_1 = seal(head, 1, b"")
    short_0 = seal(head, 0, plain[:50])
    alone = seal(head, 0, plain[:4032])
    damaged_1 = flip(b, 500)

    def trimmed(what: str, why: str, pages: Sequence[bytes], page: int, *stays: int) -> Vector:
        after, size = stays
        return Vector(
            f"{name}-trim-{what}",
            why,
            join(pages),
            "trimmed",
            page,
            plain[:size],
            None,
            after * PAGE,
            clean=False,
        )

    yield trimmed("full-0", "(a) one full page", [alone], 1, 2, 4032)
    yield trimmed("full-1", "(a) two full pages", [a, b], 2, 3, 8096)
    yield trimmed("short-1", "(b) page 1 is short, a page follows", [a, short_1, c], 1, 2, 5000)
    yield trimmed("short-0", "(b) page 0 is short, a page follows", [short_0, b], 0, 1, 50)
    yield trimmed("empty-1", "(b) an end mark, a page follows", [a, empty_1, c], 1, 2, 4032)
    yield trimmed("empty-0", "(b) an empty page 0, a page follows", [seal(head, 0, b""), b], 0, 1, 0)
    yield trimmed("zero-0", "(c) page 0 is zeros", [ZERO, b], 0, 0, 0)
    yield trimmed("zero-alone", "(c) nothing but zeros", [ZERO], 0, 0, 0)
    yield trimmed("zero-1", "(c) page 1 is zeros, page 0 gets an end mark", [a, ZERO, c], 1, 2, 4032)
    yield trimmed("zero-2", "(c) the last page is zeros", [a, b, ZERO], 2, 3, 8096)
    yield trimmed("short-zero", "(b) before (c)", [a, short_1, ZERO], 1, 2, 5000)
    yield trimmed("zero-short", "(c) before (b)", [a, ZERO, seal(head, 2, b"x"), seal(head, 3, b"")], 1, 2, 4032)
    yield trimmed("cut-0", "(d) page 0 is cut", [a[:777]], 0, 0, 0)
    yield trimmed("cut-0-in-magic", "(d) page 0 is cut in its magic", [a[:5]], 0, 0, 0)
    yield trimmed("cut-1", "(d) page 1 is cut, page 0 gets an end mark", [a, b[:777]], 1, 2, 4032)
    yield trimmed("cut-2", "(d) page 2 is cut", [a, b, c[:1]], 2, 3, 8096)
    yield trimmed("cut-zeros", "(d) a cut page of zeros", [a, bytes(100)], 1, 2, 4032)
    yield trimmed("short-cut", "(b) before (d)", [a, short_1, c[:4095]], 1, 2, 5000)
    yield trimmed(
        "damage-behind", "damage behind a short page goes with the rest", [a, short_1, flip(c, 9)], 1, 2, 5000
    )
    yield Vector(
        f"{name}-trim-damage-before",
        "damage does not end the scan, and stays",
        join([a, damaged_1, seal(head, 2, plain[:99]), c]),
        "trimmed",
        1,
        None,
        8096 + 99,
        3 * PAGE,
        clean=False,
    )
    for what, why, pages, page in (
        ("damage-last", "a damaged last page is no trace of a crash", [a, damaged_1], 1),
        ("damage-middle", "a damaged page before the last is none either", [a, damaged_1, c], 1),
        ("damage-0", "a damaged page 0 is none either", [flip(a, 500), b, c], 0),
        (
            "other-header",
            "another file's header is none either",
            [header(suite, file_id=OTHER_ID) + a[32:], b, c],
            0,
        ),
        (
            "page-of-another",
            "a page of another file is none",
            [a, seal(header(suite, file_id=OTHER_ID), 1, b"x")],
            1,
        ),
    ):
        yield Vector(f"{name}-unclean-{what}", why, join(pages), "integrity", page, clean=False)
    for size in (1, 4032, 8300):
        yield Vector(
            f"{name}-unclean-{size}",
            "an unclean stop changes nothing in a file that shows no trace of it",
            join(seal_all(head, plain[:size])),
            "success",
            plain=plain[:size],
            clean=False,
        )


def vectors() -> Iterator[Vector]:
    yield Vector("empty", "a file of no pages", b"", "success", plain=b"")
    yield Vector("unclean-empty", "the same after an unclean stop", b"", "success", plain=b"", clean=False)
    for suite in NAMES:
        for kind in (good, bad_headers, bad_pages, bad_files, unclean):
            yield from kind(suite)


def main() -> None:
    os.makedirs(DIRECTORY, exist_ok=True)
    for name in os.listdir(DIRECTORY):
        os.unlink(os.path.join(DIRECTORY, name))
    for vector in vectors():
        with open(os.path.join(DIRECTORY, f"{vector.name}.json"), "w", encoding="ascii") as file:
            json.dump(vector.document(), file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
