"""The attacker's tools: the files of a store at rest, changed so that it can be undone, and what is public about their bytes.

Public are where each mode puts a plain byte (FORMAT.md, and the formats of the others), and nats-server's records and their hash.
"""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js import format as sealed
from encfs_js.compare import victim
from encfs_js.compare.victim import HEADER
from encfs_js.jetstream import block_name
from encfs_js.natscodec import hash_key, highwayhash64

if TYPE_CHECKING:
    from encfs_js.compare.modes import Store
    from encfs_js.compare.victim import Victim

_HEAD: Final = struct.Struct("<IQqH")  # length, sequence, time, length of the subject
_HAS_HEADERS: Final = 1 << 31  # in the length


@dataclass
class Target:
    """A copy of a store under attack, and what it takes to undo what was done to it. Paths are those below the store_dir."""

    of: Victim
    store: Store
    saved: dict[str, bytes | None] = field(default_factory=dict, repr=False)
    whole: list[str] = field(default_factory=list)

    def path(self, plain: str) -> str:
        """Return the backing file."""
        return os.path.join(self.store.backing, self.of.paths[plain])

    def _save(self, path: str) -> None:
        if path not in self.saved:
            self.saved[path] = contents_of(path) if os.path.exists(path) else None

    def write(self, path: str, data: bytes) -> None:
        """Give a backing file another content; it may be new."""
        self._save(path)
        with open(path, "wb") as file:
            file.write(data)

    def remove(self, path: str) -> None:
        """Remove a backing file, if it is there."""
        self._save(path)
        if os.path.exists(path):
            os.unlink(path)

    def flip(self, path: str, offset: int) -> None:
        """Flip one bit of a backing file."""
        data = bytearray(contents_of(path))
        data[offset] ^= 4
        self.write(path, bytes(data))

    def xor(self, plain: str, at: int, difference: bytes) -> None:
        """XOR the backing file at the places where the plain bytes from `at` on lie."""
        data = bytearray(contents_of(self.path(plain)))
        for i, byte in enumerate(difference):
            data[place(self.store.mode.name, at + i)] ^= byte
        self.write(self.path(plain), bytes(data))

    def replace_directory(self, plain: str, source: Store) -> None:
        """Put the directory that a plain file lies in, with all below it, back as it is in another state."""
        below = os.path.dirname(self.of.paths[plain])
        self.whole.append(below)
        _replace(os.path.join(source.backing, below), os.path.join(self.store.backing, below))

    def undo(self) -> None:
        """Give every file that was attacked its content back."""
        for path, data in self.saved.items():
            if data is None:
                if os.path.exists(path):
                    os.unlink(path)
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
        for below in self.whole:
            _replace(os.path.join(self.of.stores["late"].backing, below), os.path.join(self.store.backing, below))


def _replace(source: str, target: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def contents_of(path: str) -> bytes:
    """Return the bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def place(mode: str, at: int) -> int:
    """Return where in the backing file the plain byte at an offset lies, encrypted: public arithmetic in every mode."""
    if mode.startswith("mount"):
        page, within = sealed.page_of(at)
        return page * sealed.PAGE + sealed.PREFIX + (sealed.HEADER if page == 0 else 0) + within
    if mode == "gocryptfs":  # a header of 18, then blocks of nonce[16], 4096, tag[16]
        return 18 + at // 4096 * 4128 + 16 + at % 4096
    if mode == "securefs":  # format 4: a header of 16, then blocks of nonce[12], 4096, tag[16]
        return 16 + at // 4096 * 4124 + 12 + at % 4096
    return at


def boundary(mode: str, plain_size: int, least: int) -> int:
    """Return where to cut a backing file so that it looks most natural, and loses at least so many plain bytes at its end."""
    left = plain_size - least
    if mode.startswith("mount"):
        return sealed.page_of(left)[0] * sealed.PAGE
    if mode == "gocryptfs":
        return 18 + left // 4096 * 4128
    if mode == "securefs":
        return 16 + left // 4096 * 4124
    return left


def record(stream: str, block: int, number: int, time: int, payload: bytes) -> bytes:
    """Return a message as nats-server stores it, with the hash that anybody can compute."""
    where = victim.subject(stream, number).encode()
    length = _HEAD.size + len(where) + 4 + len(HEADER) + len(payload) + 8
    head = _HEAD.pack(length | _HAS_HEADERS, number, time, len(where))
    key = hash_key(block_name(stream, block))
    body = where + len(HEADER).to_bytes(4, "little") + HEADER + payload
    return head + body + highwayhash64(key, head[4:20], where, HEADER, payload)
