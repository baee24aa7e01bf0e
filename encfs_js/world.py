"""The rooms of a store that is open for use, wired: by the worker of a mount, or by a command that has the store to itself."""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from encfs_js import keyring, keystore, redo, revive, state
from encfs_js.backing import META
from encfs_js.errors import EncfsError
from encfs_js.files import Files
from encfs_js.format import Suite, check_available
from encfs_js.guard import Guard
from encfs_js.reserve import Reserve
from encfs_js.sealed import FileKeys
from encfs_js.tree import Tree

if TYPE_CHECKING:
    from encfs_js.backing import Backing
    from encfs_js.keyring import Keys

log: Final = logging.getLogger("encfs_js")


@dataclass(slots=True)
class World:
    """The rooms of a mounted store, wired. reserve: None for a mount that is read-only."""

    options: dict[str, Any]
    keys: Keys
    tree: Tree
    file_keys: FileKeys
    files: Files
    reserve: Reserve | None
    run: state.State


def prepare(options: dict[str, Any], keys: Keys, io: Backing, *, resumed: bool) -> World:
    """Open the store: begin a run, or go on with the one of a worker that died (resumed).

    keys: may be older than the keyring when resumed. Raises EncfsError and OSError; a run that was begun then stays begun, and
    the next one looks at its files.
    """
    store, read_only = options["store"], options["read_only"]
    if resumed:
        keys = _newer_if_readable(options, keys, io)
    suite = _suite(options, keys)
    if not read_only:
        check_available(suite)
    tree = Tree(io, store, Guard(store), give_to_caller=os.geteuid() == 0)
    redo_key = keys.derive(redo.INFO)
    file_keys = FileKeys(keys.volume_key, suite, keys.settings.epoch)
    run = state.load(store, keys)
    reserve = None
    if not read_only:
        try:
            reserve = Reserve(io, tree.meta_fd)
        except OSError as exc:
            if not resumed or exc.errno != errno.EROFS:
                raise
            log.error(
                "%s: its file system has become read-only, and so does this mount, until it can be written again and"
                " encfs-js reload is called",
                store,
            )
            options["read_only"] = True
    if reserve is not None:
        if not resumed:
            run = reserve.make_room_for(lambda: state.begin(store, keys, time.time_ns()))
        for line in redo.recover(io, tree.root_fd, tree.meta_fd, redo_key):
            log.warning("%s", line)
    files = Files(
        tree, file_keys, run, redo_key, reserve, lambda: datetime.now(UTC),
        plaintext=keys.settings.plaintext == "read", writeback=options["writeback"],
    )  # fmt: skip
    if resumed:
        revive.walk(tree)
    log.info("%s opened, %s, epoch %d", store, suite.label, keys.settings.epoch)
    return World(options, keys, tree, file_keys, files, reserve, run)


def end_run(world: World) -> None:
    """Note that all is on the disk and the run ended well."""
    if world.reserve is not None:
        last = replace(world.files.swept or world.run, clean=True)
        world.reserve.make_room_for(lambda: state.save(world.options["store"], world.keys, last))


def rekeyed(world: World) -> Keys:
    """Read the keyring again, which a command has changed. Returns its keys, as `_newer` does. Raises EncfsError, OSError."""
    return _newer(world.options, world.keys, world.tree.io)


def use(world: World, keys: Keys) -> None:
    """Seal new files as these keys say from now on."""
    world.keys = keys
    world.file_keys.renew(keys.volume_key, _suite(world.options, keys), keys.settings.epoch)
    log.info("new files are sealed with %s, epoch %d", world.file_keys.suite.label, world.file_keys.epoch)


def _suite(options: dict[str, Any], keys: Keys) -> Suite:
    """Return what new files are sealed with: the cipher that the mount was given, or else that of the keyring."""
    return Suite.from_name(options["cipher"]) if options["cipher"] else keys.settings.cipher


def _newer(options: dict[str, Any], keys: Keys, io: Backing) -> Keys:
    """Read the keyring as it is now, with the keyring key at hand. One that is being replaced is the old or the new one, whole.

    A volume key that the keyring has no more stays: a file that has no name any more may need it until it is closed. Raises
    EncfsError, also when the host refuses the cipher that new files would get, and OSError.
    """
    found, _ = keystore.load(options["store"], backing=io)
    newer = keyring.keep_old(keyring.renew(found, keys), keys)
    if not options["read_only"]:
        check_available(_suite(options, newer))
        if newer.settings.epoch != keys.settings.epoch:
            # Who replaces the keyring may have come as far as the rename, or have died there. Its directory is on the disk
            # before any file is sealed with the epoch, or after a power cut that file could be there, and its key not.
            fd = io.open(os.path.join(options["store"], META), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                io.fsync(fd)
            finally:
                io.close(fd)
    return newer


def _newer_if_readable(options: dict[str, Any], keys: Keys, io: Backing) -> Keys:
    """Return `_newer`, or else the keys at hand.

    The supervisor's keys lack an epoch when their memory got lost on its way: it had too many files open. The worker that
    died has sealed files with that epoch, so it is in the keyring. No reason to stop serving: what was served can be.
    """
    try:
        return _newer(options, keys, io)
    except (EncfsError, OSError) as exc:
        # No warning: nothing is worse than before, and a disk that is gone is told by who needs it next.
        log.info("%s: the keyring was not read again, the keys at hand are used: %s", options["store"], exc)
        return keys


def sync(world: World) -> None:
    """Bring all that was written to the disk. Raises OSError."""
    if world.reserve is not None:
        world.tree.io.syncfs(world.tree.root_fd)
