"""The commands encrypt and decrypt: a whole store in place, from plain (or nats-server's own encryption) to sealed, and back."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from encfs_js import decrypt as opening
from encfs_js import encrypt as sealing
from encfs_js import inuse, keyring, keysource, keystore, mount, recordcheck, redo
from encfs_js import state as room
from encfs_js.backing import META, Backing
from encfs_js.cli_init import first_file
from encfs_js.cli_key import ORDER, Source, SuiteType, key_options, unlock
from encfs_js.cli_progress import display, interruptible
from encfs_js.cli_serverkey import prev_key_option, server_keys
from encfs_js.cli_text import plural, shown, size
from encfs_js.errors import ConversionError, DamageFoundError, StoreIoError, StoreNotEmptyError
from encfs_js.format import MAGIC, DamagedPageError, Suite, check_available
from encfs_js.keydocument import COPY, NAME
from encfs_js.reencrypt import Progress
from encfs_js.sealed import RUN_BYTES, FileKeys, SealedFile
from encfs_js.serverstore import Kind, place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encfs_js.inspect import Entry
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
    job = _Job(store, _origin(store, origin), cipher or source.config.jetstream.cipher)
    if job.origin == "server":
        job.server_keys = server_keys(source, prev_key_file)
        job.secret = "key", job.server_keys[0]
        if new_key_file is not None or new_credential is not None:
            environ = {"CREDENTIALS_DIRECTORY": os.environ.get("CREDENTIALS_DIRECTORY", "")}
            job.secret = (
                "key",
                keysource.find_key(key_file=new_key_file, credential=new_credential, environ=environ),
            )
    elif job.is_store:
        _, job.keys = source.unlock(store)
    else:
        job.secret = source.first_key()
    with display(as_json) as show, interruptible() as look, _told(store):
        _encrypt(job, show, look)
    _report(job, as_json=as_json)


class _Job:
    """One run of encrypt: what is asked for, and what came of it. Holds keys; its repr does not show them."""

    def __init__(self, store: str, origin: str, cipher: Suite | None) -> None:
        self.store = store
        self.origin = origin
        self.cipher = cipher
        self.is_store = _is_store(store)
        self.server_keys: list[bytes] | None = None
        self.secret: tuple[str, bytes] | None = None
        self.keys: Keys | None = None
        self.progress = Progress()
        self.records = recordcheck.Records()
        self.key_files = 0
        self.left_out: list[bytes] = []


def _is_store(store: str) -> bool:
    return any(os.path.lexists(os.path.join(store, META, name)) for name in (NAME, COPY))


def _origin(store: str, given: str | None) -> str:
    """Return what lies there. Raises ConversionError when that is not what was said, or has to be said."""
    half, there = room.is_half_sealed(store), _is_store(store)
    again = f"encfs-js encrypt {shlex.quote(store)} --from server"
    if half:
        if given == "plain":
            raise ConversionError(f"{store} was begun to be sealed with --from server", hint=again)
        return "server"
    if given == "server" and there:
        raise ConversionError(
            f"{store} is an encfs_js store: what nats-server encrypts on its mount is sealed as it is",
            hint="Decrypt it first (encfs-js decrypt), or convert it: encfs-js convert --help",
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
    store, io = job.store, Backing()
    if not job.is_store:
        _, sealed = first_file(store)
        if sealed is not None:
            raise StoreNotEmptyError(
                f"{store} has sealed files in it ({shown(sealed)}) and no keyring",
                hint="A new keyring could not read them. Put .encfs_js/keyring back from a backup of the store.",
            )
        sealing.look(io, store, job.server_keys)  # what is refused leaves not even a directory behind
    with _alone(store):
        before = job.keys
        if job.is_store:
            before = before or _opened(job)
            sealing.recover(io, store, before.derive(redo.INFO))
        found = sealing.look(io, store, job.server_keys)
        before = before or _opened(job)
        opened, _ = keystore.load(store)
        keys = keyring.renew(opened, before)  # before it was ours another may have changed them
        if job.cipher is not None and job.cipher is not keys.settings.cipher:
            changed = keystore.update(
                store, lambda found: keyring.change_settings(found, keyring.renew(found, before), cipher=job.cipher)
            )
            keys = keyring.renew(changed, before)
        check_available(keys.settings.cipher)
        if job.origin == "plain" and found.files and keys.settings.plaintext != "read":
            raise ConversionError(
                f"{store}: {plural(found.files, 'file')} not sealed, in a store that refuses plaintext",
                hint=f"Somebody put them there: encfs-js verify {shlex.quote(store)} names them.",
            )
        file_keys = FileKeys(keys.volume_key, keys.settings.cipher, keys.settings.epoch)
        progress = job.progress
        progress.cipher, progress.epoch = keys.settings.cipher.label, keys.settings.epoch
        progress.files, progress.bytes, progress.state = found.files, found.size, "running"

        def between() -> None:
            show(progress.as_json())
            look()

        sealing.seal_all(io, store, job.server_keys, file_keys, keys.derive(redo.INFO), progress, between)
        job.records = recordcheck.check(io, store, lambda entry: _content(io, entry, file_keys), look)
        if not room.load(store, keys).began:
            room.save(store, keys, room.State(clean=True, began=_now(), windows=()))  # that one is missing is to mean something
        if job.origin == "server":
            job.key_files, job.left_out = sealing.remove_keys(io, store)
            room.unmark(store)
        else:
            keystore.update(
                store, lambda found: keyring.change_settings(found, keyring.renew(found, keys), plaintext="refuse")
            )
        progress.state = "done"


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
    return unlock(job.store, secret)[1]


@contextlib.contextmanager
def _alone(store: str) -> Iterator[None]:
    """Have the store to oneself; a directory .encfs_js that is made for that goes again when no keyring came into it."""
    meta = os.path.join(store, META)
    with contextlib.suppress(FileExistsError):
        os.mkdir(meta, 0o700)
    lock = room.lock(store, "", datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        yield
    finally:
        if os.path.isdir(meta) and set(os.listdir(meta)) <= {"lock"}:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(meta, "lock"))
                os.rmdir(meta)
        os.close(lock)


@contextlib.contextmanager
def _told(store: str) -> Iterator[None]:
    """Say what the operating system refused, and that the command can be repeated."""
    try:
        yield
    except OSError as problem:
        where = os.fsdecode(problem.filename) if problem.filename is not None else store
        raise StoreIoError(
            f"{where}: {problem.strerror or problem}",
            hint="What is done stays done. When the cause is gone (a full or failing disk, permissions), repeat the command.",
        ) from None
    except KeyboardInterrupt:
        print("encfs-js: interrupted; what is done stays done, and the same command does the rest", file=sys.stderr)
        raise


def _content(io: Backing, entry: Entry, file_keys: FileKeys) -> bytes:
    """Return the plain content of a file of the store, sealed or not. Raises OSError, DamagedPageError."""
    fd = io.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=entry.directory)
    try:
        file = SealedFile(io, fd, file_keys) if sealing.begins(io, fd) == MAGIC else redo.PlainFile(io, fd)
        return b"".join(bytes(file.read(at, RUN_BYTES)) for at in range(0, file.size, RUN_BYTES))
    except DamagedPageError as problem:
        raise DamageFoundError(
            f"{os.fsdecode(entry.path)} page {problem.page} does not authenticate",
            hint="Put the file back from a backup, and repeat the command.",
        ) from None
    finally:
        io.close(fd)


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
    _print_records(job.records)
    print(f"Next: encfs-js mount {shlex.quote(job.store)} MOUNTPOINT")


def _print_records(found: recordcheck.Records) -> None:
    blocks, streams = plural(found.blocks, "block"), plural(found.streams, "stream or raft log", "streams or raft logs")
    print(f"Checked: {plural(found.records, 'record')} in {blocks} of {streams}")
    for line in found.damaged:
        print(f"Damaged, as it was before: {line}")


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
    io, progress = Backing(), Progress()
    if not _is_store(store) and os.path.isdir(os.path.join(store, META)):
        if first_file(store)[1] is None:
            opening.forget(io, store)  # a run before this one had come so far
            _report_decrypted(store, progress, recordcheck.Records(), as_json=as_json)
            return
        keystore.load(store)
    _, keys = source.unlock(store)
    with display(as_json) as show, interruptible() as look, _told(store), _alone(store):
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
        file_keys = FileKeys(keys.volume_key, keys.settings.cipher, keys.settings.epoch)
        found = opening.look(io, store, file_keys, run.touched)
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
        records = recordcheck.check(io, store, lambda entry: _content(io, entry, file_keys), between)
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
    _print_records(records)
