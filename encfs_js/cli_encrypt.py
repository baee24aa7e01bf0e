"""The commands encrypt and decrypt: a whole store in place, from plain (or nats-server's own encryption) to sealed, and back."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from encfs_js import decrypt as opening
from encfs_js import encrypt as sealing
from encfs_js import inuse, keyring, keysource, keystore, mount, recordcheck, redo
from encfs_js import state as room
from encfs_js.backing import META, Backing
from encfs_js.cli_alone import alone, content, is_store, print_records, told
from encfs_js.cli_init import first_file
from encfs_js.cli_key import ORDER, Source, SuiteType, key_options, unlock
from encfs_js.cli_progress import display, interruptible
from encfs_js.cli_serverkey import prev_key_option, server_keys
from encfs_js.cli_text import plural, shown, size
from encfs_js.errors import ConversionError, NotAStoreError, StoreBusyError, StoreNotEmptyError, WrongKeyError
from encfs_js.format import Suite, check_available
from encfs_js.reencrypt import Progress
from encfs_js.sealed import FileKeys
from encfs_js.serverstore import Kind, place_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.keyring import Keys

    Show = Callable[[dict[str, Any]], None]


@click.command(epilog=ORDER)
@click.argument("store", required=False)
@click.option(
    "--from",
    "origin",
    type=click.Choice(["plain", "server"]),
    help="What lies there: plain files (the default), or what nats-server has encrypted itself.",
)
@click.option("--cipher", type=SuiteType(), metavar="CIPHER", help="Seal with chachapoly (the default) or aes.")
@prev_key_option
@click.option("--new-key-file", metavar="FILE", help="With --from server: read the store's own key from this file.")
@click.option("--new-credential", metavar="NAME", help="With --from server: read it from this systemd credential.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@key_options
def encrypt(
    *,
    source: Source,
    store: str | None,
    origin: str | None,
    cipher: Suite | None,
    prev_key_file: str | None,
    new_key_file: str | None,
    new_credential: str | None,
    as_json: bool,
) -> None:
    """Seal every file of STORE in place.

    STORE is the directory that a plain nats-server had as its store_dir, or an encfs_js store with files that are not sealed
    yet. With --from server it is one that nats-server has encrypted itself: the key is nats-server's then, and the store
    gets the same, or the new one. Stop nats-server and unmount STORE first.

    May be interrupted and killed at any time: repeat the command, and it does the rest.
    """
    store = source.store(store)
    mount.check_store(store)
    inuse.check_unused(store)
    with told(store):
        job = _Job(store, _origin(store, origin), cipher or source.config.jetstream.cipher)
    if job.origin != "server" and (prev_key_file, new_key_file, new_credential) != (None, None, None):
        raise click.UsageError("--prev-key-file, --new-key-file and --new-credential are for --from server.")
    if new_key_file is not None and new_credential is not None:
        raise click.UsageError("Only one of --new-key-file, --new-credential can be given.")
    if job.origin == "server":
        job.server_keys = server_keys(source, prev_key_file)
        job.secret = "key", job.server_keys[0]
        if new_key_file is not None or new_credential is not None:
            environ = {"CREDENTIALS_DIRECTORY": os.environ.get("CREDENTIALS_DIRECTORY", "")}
            new = keysource.find_key(key_file=new_key_file, credential=new_credential, environ=environ)
            keysource.warn_of_weak(new)
            job.secret = "key", new
    elif job.is_store:
        _, job.keys = source.unlock(store)
    else:
        job.secret = source.first_key()
    with display(as_json) as show, interruptible() as look, told(store):
        _encrypt(job, show, look)
    _report(job, as_json=as_json)


class _Job:
    """One run of encrypt: what is asked for, and what came of it. Holds keys; its repr does not show them."""

    def __init__(self, store: str, origin: str, cipher: Suite | None) -> None:
        self.store = store
        self.origin = origin
        self.cipher = cipher
        self.is_store = is_store(store)
        self.server_keys: list[bytes] | None = None
        self.secret: tuple[str, bytes] | None = None
        self.keys: Keys | None = None
        self.progress = Progress()
        self.records = recordcheck.Records()
        self.key_files = 0
        self.left_out: list[bytes] = []
        self.links: list[bytes] = []


def _origin(store: str, given: str | None) -> str:
    """Return what lies there. Raises ConversionError when that is not what was said, or has to be said."""
    half, there = room.is_half_sealed(store), is_store(store)
    again = f"encfs-js encrypt {shlex.quote(store)} --from server"
    if half:
        if given == "plain":
            raise ConversionError(f"{store} was begun to be sealed with --from server", hint=again)
        return "server"
    if given == "server" and there:
        raise ConversionError(
            f"{store} is an encfs_js store: what nats-server encrypts on its mount is sealed as it is",
            hint="If `encrypt --from server` was at work here before, it has ended. To open what nats-server encrypts on a "
            "mount: encfs-js decrypt, then encfs-js convert --help",
        )
    if given is None and not there:
        for entry in sealing.entries(Backing(), store):
            if place_of(entry.path).kind is Kind.KEY:
                raise ConversionError(
                    f"{store}: nats-server has encrypted it itself ({shown(entry.path)})",
                    hint=f"{again} decrypts it as it is sealed. --from plain seals it as it is: nats-server then goes on "
                    "encrypting a second time.",
                )
    return given or "plain"


def _encrypt(job: _Job, show: Show, look: Callable[[], None]) -> None:
    """Do what `encrypt` says.

    Crash points: a directory .encfs_js without a keyring is no store, and the command begins again; the mark (--from server)
    is there before the keyring is; then those of encrypt.py.
    """
    store = job.store
    if not job.is_store:
        _check_new(store)
        sealing.look(Backing(), store, job.server_keys)  # what is refused leaves not even a directory behind
    with alone(store):
        if is_store(store) is not job.is_store or (room.is_half_sealed(store) and job.origin != "server"):
            # While a key was asked for, say: a new keyring must never take the place of another.
            raise StoreBusyError(f"{store}: another command was at work here just now", hint="Repeat the command.")
        if not job.is_store:
            _check_new(store)
        run = room.begin(store, job.keys, _now()) if job.keys is not None else None
        try:
            _seal(job, run, show, look)
        finally:
            if run is not None and job.keys is not None:
                room.save(store, job.keys, replace(run, clean=True))


def _check_new(store: str) -> None:
    """Raise StoreNotEmptyError if there are sealed files in what has no keyring."""
    _, sealed = first_file(store)
    if sealed is not None:
        raise StoreNotEmptyError(
            f"{store} has sealed files in it ({shown(sealed)}) and no keyring",
            hint="A new keyring could not read them. Put .encfs_js/keyring back from a backup of the store.",
        )


def _seal(job: _Job, run: room.State | None, show: Show, look: Callable[[], None]) -> None:
    store, io, before = job.store, Backing(), job.keys
    if job.is_store:
        before = before or _opened(job)
        sealing.recover(io, store, before.derive(redo.INFO))
        before = keyring.renew(keystore.load(store)[0], before)  # before it was ours another may have changed them
    crashed = (_file_keys(before), run.touched) if run is not None and before is not None else None
    plaintext = before is None or before.settings.plaintext == "read"
    found = sealing.look(io, store, job.server_keys, crashed=crashed, plaintext=plaintext)
    inuse.check_unused(store, found.inodes, lock=False)  # in a container the same files have other names
    job.links = found.links
    keys = before or _opened(job)
    if job.cipher is not None and job.cipher is not keys.settings.cipher:
        opened = keys
        changed = keystore.update(
            store, lambda found: keyring.change_settings(found, keyring.renew(found, opened), cipher=job.cipher)
        )
        keys = keyring.renew(changed, keys)
    check_available(keys.settings.cipher)
    if job.origin == "plain" and found.files and keys.settings.plaintext != "read":
        raise ConversionError(
            f"{store}: {plural(found.files, 'file')} not sealed, in a store that refuses plaintext",
            hint=f"Somebody put them there: encfs-js verify {shlex.quote(store)} names them.",
        )
    file_keys = _file_keys(keys)
    progress = job.progress
    progress.cipher, progress.epoch = keys.settings.cipher.label, keys.settings.epoch
    progress.files, progress.bytes, progress.state = found.files, found.size, "running"

    def between() -> None:
        show(progress.as_json())
        look()

    sealing.seal_all(io, store, job.server_keys, file_keys, keys.derive(redo.INFO), progress, between)
    job.records = recordcheck.check(io, store, lambda entry: content(io, entry, file_keys), look)
    if not room.load(store, keys).began:
        room.found(store, keys, _now())
    if job.origin == "server":
        job.key_files, job.left_out = sealing.remove_keys(io, store)
        room.unmark(store)
    else:
        keystore.update(
            store, lambda found: keyring.change_settings(found, keyring.renew(found, keys), plaintext="refuse")
        )
    progress.state = "done"


def _file_keys(keys: Keys) -> FileKeys:
    return FileKeys(keys.volume_key, keys.settings.cipher, keys.settings.epoch)


def _opened(job: _Job) -> Keys:
    """Make the keyring of a new store, or open that of one that was begun."""
    assert job.secret is not None
    kind, secret = job.secret
    if not job.is_store:
        cipher = job.cipher or Suite.CHACHAPOLY
        check_available(cipher)
        if job.origin == "server":
            room.mark(job.store)
        plaintext = "refuse" if job.origin == "server" else "read"
        keystore.write(job.store, keyring.create(secret, kind=kind, cipher=cipher, plaintext=plaintext))
    try:
        return unlock(job.store, secret)[1]
    except WrongKeyError as problem:
        if not job.is_store:
            raise
        raise WrongKeyError(
            str(problem),
            hint="Give the key that the store was begun to be sealed with, by --new-key-file if it was so then.",
        ) from None


def _report(job: _Job, *, as_json: bool) -> None:
    progress, left = job.progress, [os.fsdecode(path) for path in job.left_out]
    if as_json:
        told = {
            "store": job.store,
            "from": job.origin,
            "to": "sealed",
            "done": True,
            "cipher": progress.cipher,
            "epoch": progress.epoch,
            "files": progress.files_done,
            "bytes": progress.bytes_done,
            "key_files_removed": job.key_files,
            "left_out": left,
            "symlinks": [os.fsdecode(path) for path in job.links],
            **job.records.as_json(),
        }
        print(json.dumps(told, indent=1))
        return
    count = f"{plural(progress.files_done, 'file')}, {size(progress.bytes_done)}" if progress.files_done else "nothing"
    print(f"{shown(job.store)}: sealed with {progress.cipher}, epoch {progress.epoch}: {count}")
    if job.key_files:
        print(f"Removed: {plural(job.key_files, 'key file')} of nats-server")
    for path in left:
        print(f"Removed: {shown(path)}, a leftover that nats-server does not read and nobody can decrypt")
    for link in job.links:
        print(f"Left alone: {shown(link)}, a symlink: what lies outside of the store is not sealed")
    print_records(job.records)
    print(f"Next: encfs-js mount {shlex.quote(job.store)} MOUNTPOINT")


# --- decrypt ----------------------------------------------------------------------------------------------------------


@click.command(epilog=ORDER)
@click.argument("store", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@key_options
def decrypt(*, source: Source, store: str | None, as_json: bool) -> None:
    """Make STORE a plain store again, in place, and remove its keyring.

    Stop nats-server and unmount STORE first. Files of a backup of STORE cannot be opened without a keyring: keep the one in
    that backup, or a copy of this one (encfs-js key export).

    May be interrupted and killed at any time: repeat the command, and it does the rest.
    """
    store = source.store(store)
    mount.check_store(store)
    inuse.check_unused(store)
    room.check_whole(store)
    io, progress, records = Backing(), Progress(), recordcheck.Records()
    if not is_store(store) and os.path.isdir(os.path.join(store, META)):
        with told(store), alone(store):
            if is_store(store) or first_file(store)[1] is not None or opening.unfinished(io, store):
                raise NotAStoreError(
                    f"{store}: there are sealed files, and no keyring",
                    hint="Put .encfs_js/keyring back from a backup of the store, and repeat the command.",
                )
            opening.forget(io, store)  # a run before this one had come so far
        _report_decrypted(store, progress, records, as_json=as_json)
        return
    _, keys = source.unlock(store)
    with display(as_json) as show, interruptible() as look, told(store), alone(store):
        room.check_whole(store)
        opened, _ = keystore.load(store)
        keys = keyring.renew(opened, keys)
        records = _decrypt(io, store, keys, progress, lambda: (show(progress.as_json()), look())[1])
    _report_decrypted(store, progress, records, as_json=as_json)


def _decrypt(
    io: Backing, store: str, keys: Keys, progress: Progress, between: Callable[[], None]
) -> recordcheck.Records:
    run = room.begin(store, keys, _now())
    try:
        sealing.recover(io, store, keys.derive(redo.INFO))
        if left := opening.unfinished(io, store):
            raise ConversionError(
                f"{store}: {META}/{left[0]} is content that belongs to no file any more",
                hint="Look whether it is needed; move it away to go on without it.",
            )
        file_keys = _file_keys(keys)
        found = opening.look(io, store, file_keys, run.touched, plaintext=keys.settings.plaintext == "read")
        inuse.check_unused(store, found.inodes, lock=False)
        if keys.settings.plaintext != "read":
            if found.plain:
                raise ConversionError(
                    f"{store}: there are files that are not sealed, in a store that refuses plaintext",
                    hint=f"Somebody put them there: encfs-js verify {shlex.quote(store)} names them.",
                )
            keystore.update(
                store, lambda found: keyring.change_settings(found, keyring.renew(found, keys), plaintext="read")
            )
        progress.files, progress.bytes, progress.state = found.files, found.size, "running"
        opening.open_all(io, store, file_keys, progress, between)
        records = recordcheck.check(io, store, lambda entry: content(io, entry, file_keys), between)
    finally:
        room.save(store, keys, replace(run, clean=True))
    opening.forget(io, store)
    progress.state = "done"
    return records


def _now() -> int:
    return int(datetime.now(UTC).timestamp() * 10**9)


def _report_decrypted(store: str, progress: Progress, records: recordcheck.Records, *, as_json: bool) -> None:
    if as_json:
        told = {"store": store, "from": "sealed", "to": "plain", "done": True}
        told |= {"files": progress.files_done, "bytes": progress.bytes_done, **records.as_json()}
        print(json.dumps(told, indent=1))
        return
    print(f"{shown(store)} is a plain store now: {plural(progress.files_done, 'file')}, {size(progress.bytes_done)}")
    print_records(records)
