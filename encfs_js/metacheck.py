"""Check what encfs_js keeps beside the sealed files: `.encfs_js` with its keyring, state, guard and redo files.

Reads only. What is no damage, but for somebody to look at, is a warning.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js import guard, keydocument, keyring, state
from encfs_js.backing import META
from encfs_js.errors import EncfsError, StoreIoError

if TYPE_CHECKING:
    from encfs_js.backing import Backing
    from encfs_js.keyring import Keys

_REDO: Final = re.compile(rb"redo-[0-9a-f]{16}(\.orphan)?")


@dataclass(slots=True)
class Own:
    """What was found. damage: (path in the store, why) of files that are not what encfs_js has written."""

    damage: list[tuple[bytes, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(io: Backing, store: str, keys: Keys, *, busy: bool, used: bool) -> Own:
    """Check `.encfs_js`. busy: somebody has the store mounted; used: there are files in it. Raises OSError."""
    own = Own()
    if state.is_half_sealed(store):
        own.warnings.append(
            "only a part of the store is sealed yet, the rest is as nats-server has encrypted it and counts as damage here; "
            "`encfs-js encrypt STORE --from server` goes on"
        )
    _copy(store, keys, own)
    _state(store, keys, own, used=used)
    _guard(store, own)
    meta = io.open(os.path.join(store, META), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        names = sorted(io.listdir(meta))
    finally:
        io.close(meta)
    for match in filter(None, map(_REDO.fullmatch, names)):
        name = f"{META}/{os.fsdecode(match[0])}"
        if match[1]:
            own.warnings.append(f"{name} is the content of a file that is gone: remove it if nobody misses anything")
        elif not busy:
            own.warnings.append(f"{name}: the rewriting of a file was interrupted; the next mount finishes it")
    return own


def _path(name: str) -> bytes:
    return os.fsencode(f"{META}/{name}")


def _copy(store: str, keys: Keys, own: Own) -> None:
    """Authenticate keyring.bak; that it is missing, damaged, or not the same as the keyring, `keystore.load` has said."""
    try:
        with open(os.path.join(store, META, keydocument.COPY), "rb") as file:
            copy = keydocument.parse(file.read(keydocument.MAX_DOCUMENT + 1))
    except (FileNotFoundError, EncfsError):
        return
    try:
        keyring.renew(copy, keys)
    except EncfsError as problem:
        own.warnings.append(f"{META}/{keydocument.COPY} does not belong to the keyring: {problem}")


def _state(store: str, keys: Keys, own: Own, *, used: bool) -> None:
    """Authenticate the state. A store that nobody has mounted yet has none."""
    if os.path.lexists(os.path.join(store, META, "state")):
        if not state.load(store, keys).began:  # 0: it was not taken for authentic
            own.damage.append((_path("state"), "does not authenticate; it is taken for that of a clean stop"))
    elif used:
        own.warnings.append(f"{META}/state is missing: what an unclean stop left is called damage")


def _guard(store: str, own: Own) -> None:
    try:
        closed = guard.read(store)
    except StoreIoError:
        own.damage.append((_path("guard"), "cannot be read; it says what is protected from removal"))
        return
    own.warnings += [
        f"the guard is closed over {guard.subject(c.directory)} since {c.since}: {os.fsdecode(c.file)} page {c.page}"
        for c in closed
    ]
