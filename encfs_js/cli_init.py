"""The command init: make a directory a store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import stat
from typing import TYPE_CHECKING

import click

from encfs_js import keyring, keystore, mount
from encfs_js.backing import META, Backing, sync_directory
from encfs_js.cli_key import ORDER, Source, SuiteType, key_options
from encfs_js.cli_text import shown
from encfs_js.errors import (
    NotAStoreError,
    StoreBusyError,
    StoreExistsError,
    StoreIoError,
    StoreNotEmptyError,
    StoreUnsuitableError,
)
from encfs_js.format import MAGIC, Suite, check_available
from encfs_js.inspect import open_file, walk
from encfs_js.keydocument import COPY, NAME

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.command(epilog=ORDER)
@click.argument("store", required=False)
@click.option(
    "--cipher",
    type=SuiteType(),
    metavar="CIPHER",
    help="Seal new files with chachapoly (the default) or aes.",
)
@click.option(
    "--plaintext",
    type=click.Choice(["refuse", "read"]),
    help="What a file that is not sealed is: damage (refuse, the default), or a file from before (read).",
)
@key_options
def init(source: Source, store: str | None, cipher: Suite | None, plaintext: str | None) -> None:
    """Make STORE a store: a new volume key, wrapped by your key.

    STORE is an empty directory, or is made, with mode 0700. A directory with files in it, such as the store of a plain
    nats-server, is taken with --plaintext read: they stay readable, and each is sealed before its first change. Stop
    nats-server first.
    """
    config, store = source.config, source.store(store)
    chosen = cipher or config.jetstream.cipher or Suite.CHACHAPOLY
    policy = plaintext or config.plaintext or "refuse"
    _check_new(store, policy)
    check_available(chosen, hint="Take the other one: --cipher aes")
    kind, key = source.first_key()
    document = keyring.create(key, kind=kind, cipher=chosen, plaintext=policy)
    with _made(store):
        _check_new(store, policy)  # again, now that nobody else can
        keystore.write(store, document)
    print(f"{shown(store)} is a store now: new files are sealed with {chosen.label}, plaintext: {policy}.")
    if kind == "tpm":
        code = f"encfs-js key add {shlex.quote(store)} --config {shlex.quote(str(source.config_file))} --recovery"
        print(f"Without this machine's TPM nothing in the store can be read. A code for that case: {code}")
    else:
        print("Keep the key in a safe place as well: without it nothing in the store can be read.")
    print(f"Next: encfs-js mount {shlex.quote(store)} MOUNTPOINT")


def _check_new(store: str, policy: str) -> None:
    """Refuse what `init` must not touch. Reads only."""
    parent = os.path.dirname(os.path.abspath(store))
    if not os.path.isdir(parent):
        raise NotAStoreError(f"{parent}: no such directory", hint=f"mkdir -p {shlex.quote(parent)}")
    if not os.path.lexists(store):
        mount.check_store(parent)
        return
    if not os.path.isdir(store):
        raise StoreUnsuitableError(
            f"{store} is not a directory", hint="Name a directory, or a path that does not exist yet."
        )
    mount.check_store(store)
    for name in (NAME, COPY):
        if os.path.lexists(os.path.join(store, META, name)):
            raise StoreExistsError(
                f"{store} is a store already",
                hint=f"Mount it: encfs-js mount {shlex.quote(store)} MOUNTPOINT",
            )
    first, sealed = first_file(store)
    if sealed is not None:
        raise StoreNotEmptyError(
            f"{store} has sealed files in it ({shown(sealed)}) and no keyring",
            hint="A new keyring could not read them. Put .encfs_js/keyring back from a backup of the store.",
        )
    if first is not None and policy == "refuse":
        raise StoreNotEmptyError(
            f"{store} is not empty ({shown(first)})",
            hint="Name an empty directory; or, to go on with the store of a plain nats-server: "
            f"encfs-js init {shlex.quote(store)} --plaintext read",
        )


def first_file(store: str) -> tuple[bytes | None, bytes | None]:
    """Return the paths of the first entry of a directory (an empty lost+found does not count), and of a sealed file."""

    def failed(path: bytes, problem: OSError) -> None:
        raise OSError(problem.errno, problem.strerror, os.path.join(store, os.fsdecode(path)))

    io, first = Backing(), None
    for entry in walk(io, store, failed):
        if first is None and entry.path != b"lost+found":
            first = entry.path
        if stat.S_ISREG(entry.status.st_mode) and (fd := open_file(io, entry)) is not None:
            try:
                start = bytearray(len(MAGIC))
                if io.preadv(fd, [start], 0) and start == MAGIC:
                    return first, entry.path
            finally:
                io.close(fd)
    return first, None


@contextlib.contextmanager
def _made(store: str) -> Iterator[None]:
    """Make the directory if it is missing, durably, and keep every other `init` out of it for the block."""
    try:
        os.mkdir(store, 0o700)
    except FileExistsError:
        pass
    except OSError as problem:
        raise StoreIoError(f"{store}: {problem.strerror}", hint="Make the directory yourself, and repeat.") from None
    else:
        sync_directory(os.path.dirname(os.path.abspath(store)))
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise StoreBusyError(
            f"{store}: another init is at work", hint="Wait for it to end, then see: encfs-js inspect STORE"
        ) from None
    finally:
        os.close(fd)
