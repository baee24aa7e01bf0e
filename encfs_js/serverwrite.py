"""Plain files as nats-server encrypts them: the other direction of `serverstore`.

Every stream, consumer, raft group, staged batch and block gets a key file with a seed and a nonce of its own; the files
beside it are sealed with that. Raft logs are always chachapoly, whatever the server's cipher is (measured: their key files
are of 72 bytes under `cipher: aes`, too).

A block's keystream begins at 0 and must not be used for two contents. nats-server does that (a block and its compressed or
compacted rewriting have one key file), this room does not: leftovers of a rewriting, which nats-server never reads, are for
the caller to leave out. The N.idx of 2.9 has the nonce of its N.key, as 2.9 has it; no newer server writes one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from encfs_js import serverkeys
from encfs_js.errors import FormatError
from encfs_js.format import Suite
from encfs_js.natscodec import hash_key, highwayhash64
from encfs_js.serverkeys import NONCES, TAG, Keystream
from encfs_js.serverstore import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encfs_js.redo import Source
    from encfs_js.serverkeys import Seed
    from encfs_js.serverstore import Place

HASH: Final = 8  # bytes of HighwayHash at the end of index.db
_RUN: Final = 1 << 20
SEALED: Final = frozenset({Kind.META, Kind.CONSUMER, Kind.INDEX, Kind.OLD_INDEX})
NEEDS_KEY: Final = SEALED | {Kind.BLOCK}


def suite_of(path: bytes, cipher: Suite) -> Suite:
    """Return what nats-server, set to `cipher`, encrypts the file at this path of the store with."""
    parts = path.removeprefix(b"jetstream/").split(b"/")
    return Suite.CHACHAPOLY if parts[1:2] == [b"_js_"] else cipher


def new_key(place: Place, path: bytes, key: bytes, cipher: Suite, random: Callable[[int], bytes]) -> tuple[bytes, Seed]:
    """Make the key file that a file needs: its content, and the seed in it. Raises CipherMissingError."""
    assert place.asset is not None
    return serverkeys.new_key_file(key, place.asset, suite_of(path, cipher), random)


def encrypted_size(kind: Kind, plain: int, suite: Suite) -> int:
    """Return the bytes on the disk of a file of `plain` bytes."""
    if not plain or kind not in SEALED:
        return plain
    return plain + TAG + (0 if kind is Kind.OLD_INDEX else NONCES[suite])


def encrypted(source: Source, place: Place, path: bytes, seed: Seed, random: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield what a file is on the disk, part by part; what is empty stays empty.

    Raises FormatError for an index.db whose hash does not match (nats-server would not read it, and encrypted it could not
    be told from one that was tampered with), CipherMissingError, and what `source` raises.
    """
    if place.kind is Kind.BLOCK:
        keystream = Keystream(seed)
        for at in range(0, source.size, _RUN):
            yield keystream.xor(source.read(at, _RUN), at)
        return
    plain = _all(source)
    if not plain:
        return
    match place.kind:
        case Kind.INDEX:
            body, mark = plain[:-HASH], plain[-HASH:]
            if highwayhash64(hash_key(place.label), body) != mark:
                raise FormatError(
                    f"{os.fsdecode(path)}: its hash does not match",
                    hint="Start nats-server on the store and stop it: it makes index.db anew.",
                )
            sealed = serverkeys.seal_file(body, seed, random(NONCES[seed.suite]))
            yield sealed + highwayhash64(hash_key(place.label), sealed)
        case Kind.OLD_INDEX:
            yield serverkeys.seal_file(plain, seed, seed.nonce)[len(seed.nonce) :]
        case _:
            yield serverkeys.seal_file(plain, seed, random(NONCES[seed.suite]))


def checksum(plain_sum: bytes, plain_meta: bytes, raw_meta: bytes, label: str) -> bytes:
    """Return the content of meta.sum for an encrypted meta.inf `raw_meta`: wrong as it is where it is wrong for the plain one."""
    if plain_sum != highwayhash64(hash_key(label), plain_meta).hex().encode():
        return plain_sum
    return highwayhash64(hash_key(label), raw_meta).hex().encode()


def _all(source: Source) -> bytes:
    return b"".join(bytes(source.read(at, _RUN)) for at in range(0, source.size, _RUN))
