"""Whose a store's files are, and in what state each lies on the disk, without a key: accounts, streams, consumers, raft groups.

By names, sizes and first bytes. In one store any mixture of modes can be, so each file is counted by its own: sealed (by
encfs_js), server (encrypted by nats-server itself), plain, empty.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js import jetstream, serverstate
from encfs_js.errors import FormatError, StoreIoError, WrongKeyError
from encfs_js.serverkeys import KEY_FILES, NONCES, TAG, open_key_file
from encfs_js.serverstore import Kind, place_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from encfs_js.backing import Backing
    from encfs_js.inspect import Entry, Seen
    from encfs_js.serverstore import Place

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TOP: Final = b"jetstream"
_OWNING: Final = frozenset({b"streams", b"_js_"})
_HEAD: Final = 1 << 16  # bytes of a block that are looked at
_MOST: Final = 64 << 20  # bytes of a file that are looked at to see whether it is plain


class Mode(enum.Enum):
    """How a file lies on the disk."""

    SEALED = "sealed"
    SERVER = "server"
    PLAIN = "plain"
    EMPTY = "empty"


class Nature(NamedTuple):
    """How a file lies on the disk: its mode, its cipher ("" where there is none, or none that is known), its epoch or 0."""

    mode: Mode
    cipher: str = ""
    epoch: int = 0


@dataclass(slots=True)
class Tally:
    """Files of one nature. disk, plain: bytes. main: how many of them nats-server would encrypt if it had a key."""

    files: int = 0
    disk: int = 0
    plain: int = 0
    main: int = 0


Tallies = dict[Nature, Tally]


@dataclass(slots=True)
class Owner:
    """What has a directory of its own: a stream, a raft group, a staged batch, a snapshot that is being restored.

    path: its directory, in the store. blocks: message blocks that are in use; key_files: of nats-server's own encryption;
    leftovers: staged files that nats-server never reads.
    """

    name: str
    path: bytes
    tallies: Tallies = field(default_factory=dict)
    blocks: int = 0
    key_files: int = 0
    leftovers: int = 0
    opened: Counter[int] = field(default_factory=Counter)
    consumers: list[str] = field(default_factory=list)
    batches: dict[bytes, Owner] = field(default_factory=dict)

    def sum(self) -> Tally:
        """Return all files together."""
        return total(self.tallies)


@dataclass(slots=True)
class Account:
    """An account's streams by the names of their directories; deleting: those that are being deleted."""

    name: str
    streams: dict[bytes, Owner] = field(default_factory=dict)
    deleting: dict[bytes, Owner] = field(default_factory=dict)
    groups: dict[bytes, Owner] = field(default_factory=dict)
    restoring: dict[bytes, Owner] = field(default_factory=dict)


def total(tallies: Tallies) -> Tally:
    """Return files of all natures together."""
    return Tally(
        *(sum(getattr(tally, name) for tally in tallies.values()) for name in ("files", "disk", "plain", "main"))
    )


def looks_like_a_store(io: Backing, store: str) -> bool:
    """Tell whether a directory is one that nats-server has as `store_dir`. Raises OSError when it cannot be opened.

    There is `jetstream/<account>/streams` or `_js_` in it, or `<account>/streams`, or a `jetstream` that is empty.
    """
    with opened(io, store) as top:
        names = _directories(io, top)
        if _TOP in names:
            with opened(io, _TOP, top) as inner:
                inside = io.listdir(inner)
                return not inside or any(_OWNING & _below(io, inner, name) for name in inside)
        return any(_OWNING & _below(io, top, name) for name in names)


def is_store(io: Backing, store: str) -> bool:
    """Tell the same of what may not be there. Raises StoreIoError where this user may not look."""
    try:
        return looks_like_a_store(io, store)
    except PermissionError as problem:
        raise StoreIoError(
            f"{store}: what is in it cannot be looked at: {problem.strerror}",
            hint="Run the command as the user that owns the store.",
        ) from None
    except OSError:
        return False


@contextlib.contextmanager
def opened(io: Backing, path: str | bytes, top: int | None = None) -> Iterator[int]:
    """Open a directory, of which nothing but the first name may be a symlink, and that only without `top`. Raises OSError."""
    if top is None:
        fd = io.open(path, _DIRECTORY & ~os.O_NOFOLLOW)
    else:
        fd, last = -1, top
        try:
            for name in os.fsencode(path).split(b"/"):
                fd = io.open(name, _DIRECTORY, dir_fd=last)
                if last != top:
                    io.close(last)
                last = fd
        except OSError:
            if last != top:
                io.close(last)
            raise
    try:
        yield fd
    finally:
        io.close(fd)


def _directories(io: Backing, fd: int) -> set[bytes]:
    return {name for name, _, is_directory in io.entries(fd) if is_directory}


def _below(io: Backing, top: int, name: bytes) -> set[bytes]:
    try:
        with opened(io, name, top) as fd:
            return _directories(io, fd)
    except OSError:
        return set()


@dataclass(slots=True)
class Census:
    """What a store holds. `take` is for inspect.survey, which calls it with every directory and every regular file.

    keys: of nats-server's own encryption (key, prev_key). opened: how many key files each of them opened; unopened: (path, why).
    key_files: how many there are.
    """

    io: Backing
    keys: Sequence[bytes] = field(default=(), repr=False)
    tallies: Tallies = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)
    key_files: int = 0
    opened: Counter[int] = field(default_factory=Counter)
    unopened: list[tuple[bytes, str]] = field(default_factory=list)
    wrong: int = 0

    def take(self, entry: Entry, fd: int, seen: Seen | None) -> None:
        """Take in one entry of the walk. Raises OSError."""
        owners = self._owners(entry.path, is_directory=seen is None)
        if seen is None:
            return
        place = place_of(entry.path)
        nature, plain = self._nature(entry, fd, seen, place)
        for tallies in (self.tallies, *(owner.tallies for owner in owners)):
            tally = tallies.setdefault(nature, Tally())
            tally.files += 1
            tally.disk += seen.size
            tally.plain += plain
            tally.main += place.asset is not None and place.kind not in {Kind.SUM, Kind.KEY}
        if place.asset is None:
            return
        for owner in owners[-1:]:
            parts = entry.path.removeprefix(owner.path + b"/").split(b"/")
            owner.leftovers += place.staged or parts[0] in {b"__msgs__", b"__new_msgs__"}
            owner.blocks += len(parts) == 2 and parts[0] == b"msgs" and len(jetstream.block_numbers(parts[1:]))
        if place.kind is Kind.KEY and nature.mode in {Mode.SERVER, Mode.EMPTY}:
            self._take_key_file(entry, fd, seen.size, place, owners)

    def _owners(self, path: bytes, *, is_directory: bool) -> list[Owner]:
        """Return what an entry belongs to, the outermost first, and note what was not met before."""
        parts = path.split(b"/")
        at = 1 if parts[0] == _TOP else 0
        parts = parts[at:]
        if len(parts) < 2 or parts[1] not in {*_OWNING, b"__snapshots__"} or (len(parts) == 2 and not is_directory):
            return []
        name = os.fsdecode(parts[0])
        account = self.accounts.setdefault(name, Account(name))
        if len(parts) == 2 or (len(parts) == 3 and not is_directory):
            return []
        place = {b"streams": account.streams, b"_js_": account.groups}.get(parts[1], account.restoring)
        own = parts[2]
        if parts[1] == b"streams" and own.startswith(b"."):
            place, own = account.deleting, own[1:]
        owner = place.setdefault(own, Owner(os.fsdecode(own), b"/".join(path.split(b"/")[: at + 3])))
        rest = parts[3:]
        if is_directory and len(rest) == 2 and rest[0] == b"obs":
            owner.consumers.append(os.fsdecode(rest[1]))
        if len(rest) > 1 and rest[0] == b"batches" and (is_directory or len(rest) > 2):
            batch = owner.batches.setdefault(rest[1], Owner(os.fsdecode(rest[1]), owner.path + b"/batches/" + rest[1]))
            return [owner, batch]
        return [owner]

    def _take_key_file(self, entry: Entry, fd: int, size: int, place: Place, owners: list[Owner]) -> None:
        self.key_files += 1
        for owner in owners:
            owner.key_files += 1
        assert place.asset is not None
        path = os.fsdecode(entry.path)
        if not self.keys and size in KEY_FILES:
            return
        raw = _head(self.io, fd, max(KEY_FILES) + 1)
        try:
            number = open_key_file(raw, place.asset, self.keys, path).key
        except (FormatError, WrongKeyError) as problem:
            self.wrong += isinstance(problem, WrongKeyError)
            if not place.staged:
                self.unopened.append((entry.path, str(problem).removeprefix(f"{path}: ")))
            return
        self.opened[number] += 1
        for owner in owners:
            owner.opened[number] += 1

    def _nature(self, entry: Entry, fd: int, seen: Seen, place: Place) -> tuple[Nature, int]:
        """Return how a file lies on the disk, and how many plain bytes it holds as far as that can be told."""
        if not seen.size:
            return Nature(Mode.EMPTY), 0
        if seen.suite is not None:
            return Nature(Mode.SEALED, seen.suite, seen.epoch), seen.plain
        if place.asset is None or place.kind is Kind.SUM:
            return Nature(Mode.PLAIN), seen.size
        if place.kind is Kind.KEY:
            suite = KEY_FILES.get(seen.size)
            return Nature(Mode.SERVER, suite.label if suite else ""), 0  # a plain store has none
        size = self._size_beside(entry, place.key)
        if size is None and place.kind is Kind.BLOCK:
            size = self._size_beside(entry, b"../meta.key") and 0  # it is encrypted, and with what is not known
        if size is None or _is_plain(self.io, fd, seen.size, place, os.fsdecode(entry.path)):
            return Nature(Mode.PLAIN), seen.size
        suite = KEY_FILES.get(size)
        more = 0
        if suite is not None and place.kind is not Kind.BLOCK:
            more = TAG + (0 if place.kind is Kind.OLD_INDEX else NONCES[suite])
        return Nature(Mode.SERVER, suite.label if suite else ""), max(seen.size - more, 0)

    def _size_beside(self, entry: Entry, name: bytes) -> int | None:
        try:
            return self.io.stat(name, dir_fd=entry.directory, follow_symlinks=False).st_size
        except FileNotFoundError:
            return None


def _head(io: Backing, fd: int, size: int) -> bytes:
    raw = bytearray(size)
    return bytes(raw[: io.preadv(fd, [raw], 0)])


def _is_plain(io: Backing, fd: int, size: int, place: Place, path: str) -> bool:
    """Tell whether a file that has a key file is in the clear all the same: nats-server makes the key file first.

    What a block holds is told from its first record, so one whose first record is damaged counts as encrypted.
    """
    head = _head(io, fd, min(size, _HEAD))
    try:
        match place.kind:
            case Kind.BLOCK:
                if (compressed := jetstream.begins_compressed(head)) is not None:
                    return compressed
                record = jetstream.head_of(head, 0)
                if record is None or record.length > size:
                    return False
                first = head[: record.length] if record.length <= len(head) else _head(io, fd, record.length)
                next(jetstream.records(first, place.label, path))
            case Kind.OLD_INDEX:
                return head[:2] == b"\x16\x01"
            case Kind.META:
                jetstream.parse_meta(_head(io, fd, min(size, _MOST)) if head[:1] == b"{" else b"", path)
            case Kind.CONSUMER:
                serverstate.parse_consumer(_head(io, fd, min(size, _MOST)) if head[:1] == b"\x16" else b"", path)
            case _:
                body = _head(io, fd, min(size, _MOST))[: -jetstream.HASH] if head[:1] == b"\x0b" else b""
                serverstate.parse_index(body, path)
    except FormatError:
        return False
    return True
