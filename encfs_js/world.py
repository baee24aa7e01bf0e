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

    Raises EncfsError and OSError; a run that was begun then stays begun, and the next one looks at its files.
    """
    store, read_only = options["store"], options["read_only"]
    suite = Suite.from_name(options["cipher"]) if options["cipher"] else keys.settings.cipher
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
    """Read the keyring again, which a command has changed, with the keyring key at hand. Returns its keys.

    A volume key that the keyring has no more stays: a file that has no name any more may need it until it is closed. Raises
    EncfsError.
    """
    found, _ = keystore.load(world.options["store"])
    keys = keyring.renew(found, world.keys)
    check_available(keys.settings.cipher)
    return keyring.keep_old(keys, world.keys)


def use(world: World, keys: Keys) -> None:
    """Seal new files as these keys say from now on."""
    chosen = world.options["cipher"]
    world.keys = keys
    world.file_keys.renew(
        keys.volume_key, Suite.from_name(chosen) if chosen else keys.settings.cipher, keys.settings.epoch
    )
    log.info("new files are sealed with %s, epoch %d", world.file_keys.suite.label, world.file_keys.epoch)


def sync(world: World) -> None:
    """Bring all that was written to the disk. Raises OSError."""
    if world.reserve is not None:
        world.tree.io.syncfs(world.tree.root_fd)
