"""The command convert: a store into another directory, in another form or under another key."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from encfs_js import convert as room
from encfs_js import inuse, keyring, keysource, keystore, mount, serverkeys, staging, state
from encfs_js import survey as surveying
from encfs_js.backing import META, Backing
from encfs_js.cli_key import ORDER, Source, SuiteType, key_options, unlock
from encfs_js.cli_progress import display
from encfs_js.cli_serverkey import prev_key_option, server_keys
from encfs_js.cli_text import plural, shown, size
from encfs_js.errors import ConfigError, ConversionError, NotAStoreError, StoreIoError, WrongKeyError
from encfs_js.format import Suite, check_available
from encfs_js.keydocument import COPY, NAME
from encfs_js.sealed import FileKeys
from encfs_js.serverstore import place_of
from encfs_js.sides import Form, Side

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.keyring import Keys
    from encfs_js.staging import Found, Stage
    from encfs_js.survey import Survey

_OFTEN = 0.1  # seconds between two looks of the progress bar
_FORMS = click.Choice([form.value for form in Form])


@click.command(epilog=ORDER)
@click.argument("src")
@click.argument("dst")
@click.option("--from", "origin", type=_FORMS, required=True, help="What SRC is: plain, server or sealed.")
@click.option("--to", "goal", type=_FORMS, required=True, help="What DST becomes: plain, server or sealed.")
@click.option("--cipher", type=SuiteType(), metavar="CIPHER", help="Encrypt DST with chachapoly or aes.")
@click.option("--new-key-file", metavar="FILE", help="Read the key of DST from this file, if it is another one.")
@click.option("--new-credential", metavar="NAME", help="Read the key of DST from this systemd credential.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@prev_key_option
@key_options
def convert(
    *,
    source: Source,
    src: str,
    dst: str,
    origin: str,
    goal: str,
    cipher: Suite | None,
    new_key_file: str | None,
    new_credential: str | None,
    prev_key_file: str | None,
    as_json: bool,
) -> None:
    """Carry a store over into another directory, in another form.

    SRC and DST are store directories, with `jetstream` in them. plain: as nats-server without a key has it. server: as
    nats-server with a `key` encrypts it. sealed: a store of encfs_js. SRC stays as it is; stop nats-server and unmount SRC
    first. DST is a directory that is free or empty, or, with --to sealed, an encfs_js store that is empty.

    May be interrupted and killed at any time: repeat the command, and it does the rest. When it ends without an error every
    byte of DST was read back from the disk and compared with SRC, index.db included, which a nats-server would otherwise
    make anew, with messages in it that were deleted.
    """
    forms = Form(origin), Form(goal)
    _check_options(forms, cipher, prev_key_file, new_key_file or new_credential, source)
    io = Backing()
    found = _surveyed(io, src, dst, forms[0])
    chosen = cipher or source.config.jetstream.cipher
    wanted = {
        "source": os.path.realpath(src),
        "from": origin,
        "to": goal,
        "cipher": (chosen or Suite.CHACHAPOLY).label if forms[1] is Form.SERVER else chosen.label if chosen else "",
    }
    there = staging.look(io, dst, wanted)
    if forms[1] is Form.SEALED:
        mount.check_store(dst if there.exists else os.path.dirname(os.path.abspath(dst)))
    keys = _Keys(source, src, dst, forms, chosen)
    with contextlib.ExitStack() as held:
        side = keys.of_source(io, found, prev_key_file)
        keys.find_target(there, new_key_file, new_credential)
        if goal != "plain" and (chosen is not None or not there.keyring):
            check_available(chosen or Suite.CHACHAPOLY, hint="Take the other one: --cipher aes")
        for store in (src, dst):
            if os.path.isdir(os.path.join(store, META)):
                _hold(held, store)
        staged = _staged(io, dst)
        if not there.published:
            room.check_room(io, dst, found, sealed=forms[1] is Form.SEALED, staged=staged)
        progress = room.Progress()
        show = held.enter_context(display(as_json))
        work = room.Conversion(
            io, src, dst, wanted, side, keys.of_target, chosen or Suite.CHACHAPOLY, found, os.urandom, progress,
            _seldom(lambda: show(progress.as_json())),
        )  # fmt: skip
        try:
            result = room.convert(work)
        except OSError as problem:
            raise StoreIoError(
                f"{(problem.filename and os.fsdecode(problem.filename)) or dst}: {problem.strerror}",
                hint="Make room, or set the permissions right, and repeat the command: it does the rest.",
            ) from None
        except KeyboardInterrupt:
            print("encfs-js: interrupted; the same command does the rest", file=sys.stderr)
            raise click.Abort from None
        show(progress.as_json())
    _report(src, dst, forms, found, result, as_json=as_json)


def _seldom(call: Callable[[], None]) -> Callable[[], None]:
    last = 0.0

    def sometimes() -> None:
        nonlocal last
        if time.monotonic() - last > _OFTEN:
            last = time.monotonic()
            call()

    return sometimes


# -- before anything is written


def _check_options(
    forms: tuple[Form, Form], cipher: Suite | None, prev_key_file: str | None, new: str | None, source: Source
) -> None:
    if prev_key_file is not None and forms[0] is not Form.SERVER:
        raise click.UsageError(
            "--prev-key-file: only what nats-server has encrypted (--from server) has a previous key."
        )
    if forms[1] is Form.PLAIN and (new or cipher is not None):
        raise click.UsageError("--cipher, --new-key-file and --new-credential: a plain DST is not encrypted.")
    if source.config.jetstream.tpm is not None and forms[1] is Form.SERVER and not new:
        raise click.UsageError("--to server: name the key that nats-server is to have: --new-key-file FILE")


def _surveyed(io: Backing, src: str, dst: str, origin: Form) -> Survey:
    """Look at SRC, and refuse what cannot be converted. Raises EncfsError, OSError."""
    if not os.path.isdir(src):
        raise NotAStoreError(f"{src}: no such directory", hint="Name the directory with `jetstream` in it.")
    theirs, ours = os.path.realpath(src), os.path.realpath(dst)
    if f"{theirs}/".startswith(f"{ours}/") or f"{ours}/".startswith(f"{theirs}/"):
        raise ConfigError(f"{src} and {dst}: one lies in the other", hint="Name a directory apart from SRC.")
    inuse.check_unused(src)
    if os.path.isdir(dst):
        inuse.check_unused(dst)
    found = surveying.survey(io, src)
    if found.has_stage:
        raise ConversionError(
            f"{src} is the target of a conversion that has not finished",
            hint="Finish that one first, with the same command as before.",
        )
    if not found.may_be(origin):
        raise ConfigError(
            f"{src} is not what --from says: it is {found.form.value}", hint=f"Repeat with --from {found.form.value}"
        )
    if found.refused:
        listed = "; ".join(f"{shown(path) or '.'}: {why}" for path, why in found.refused[:5])
        raise ConversionError(
            f"{src}: {plural(len(found.refused), 'entry', 'entries')} cannot be carried over: {listed}",
            hint="Nothing was written. Take them away, or run the command as the user that owns the store.",
        )
    inuse.check_unused(src, found.inodes)  # again: in a container the same files have other names
    return found


def _hold(held: contextlib.ExitStack, store: str) -> None:
    """Have a sealed store to ourselves: nobody mounts it meanwhile. Writes nothing but who has it into its lock."""
    lock = state.lock(store, "", datetime.now(UTC).isoformat(timespec="seconds"))
    held.callback(os.close, lock)


def _staged(io: Backing, dst: str) -> int:
    """Return how many bytes an interrupted conversion has written already."""
    tree = os.path.join(dst, state.STAGE, "tree")
    if not os.path.isdir(tree):
        return 0
    found = surveying.survey(io, tree)
    return found.size


# -- keys


class _Keys:
    """The keys of both sides, each asked for once. A server's key is a string; a sealed store's opens its keyring."""

    def __init__(self, source: Source, src: str, dst: str, forms: tuple[Form, Form], cipher: Suite | None) -> None:
        self._source = source
        self._src = src
        self._dst = dst
        self._forms = forms
        self._cipher = cipher
        self._key: bytes | None = None  # of SRC
        self._secret: tuple[str, bytes] = ("key", b"")  # of DST
        self._keys: Keys | None = None

    def of_source(self, io: Backing, found: Survey, prev_key_file: str | None) -> Side:
        """Return SRC's side. Raises EncfsError, also when the key does not open it."""
        origin = self._forms[0]
        if origin is Form.PLAIN:
            return Side(origin)
        if origin is Form.SERVER:
            self._key = self._source.key()
            keys = server_keys(self._source, prev_key_file, self._key)
            _check_server_keys(io, self._src, found, keys)
            return Side(origin, server_keys=keys)
        keystore.load(self._src)  # nobody should be asked for the key of what is no store
        state.check_whole(self._src)
        self._key = self._source.key()
        _, opened = unlock(self._src, self._key)
        if self._forms[1] is Form.SERVER and found.encrypted:
            raise ConversionError(
                f"{self._src}: what is sealed there is a store that nats-server encrypts itself",
                hint="Convert it with --to plain first: DST is then what nats-server has written.",
            )
        left = [name for name in os.listdir(os.path.join(self._src, META)) if name.startswith("redo-")]
        if any(not name.endswith((".tmp", ".orphan")) for name in left):
            raise ConversionError(
                f"{self._src}: the rewriting of a file is not finished",
                hint=f"encfs-js reencrypt {shlex.quote(self._src)} finishes it. Then repeat the command.",
            )
        return _sealed_side(self._src, opened, None)

    def find_target(self, there: Found, new_key_file: str | None, new_credential: str | None) -> None:
        """Find the key of DST: the new one, SRC's, or where that has none the key that was given. Raises EncfsError."""
        goal = self._forms[1]
        if goal is Form.PLAIN:
            return
        if goal is Form.SEALED and (there.keyring or there.published) and self._keyring_at() is None:
            raise NotAStoreError(
                f"{self._dst}: its keyring is missing",
                hint="Put it back from a backup, or name a directory that is free.",
            )
        if new_key_file is not None or new_credential is not None:
            environ = {"CREDENTIALS_DIRECTORY": os.environ.get("CREDENTIALS_DIRECTORY", "")}
            key = keysource.find_key(key_file=new_key_file, credential=new_credential, environ=environ)
            self._secret = "key", key
        elif self._key is not None:
            self._secret = "key", self._key
        elif goal is Form.SERVER or self._keyring_at() is not None:
            self._secret = "key", self._source.key()
        else:
            self._secret = self._source.first_key()
        if (at := self._keyring_at()) is not None:
            _, self._keys = unlock(at, self._secret[1])

    def _keyring_at(self) -> str | None:
        """Return the directory in which DST's keyring lies, DST or its stage, None if there is none."""
        if self._forms[1] is not Form.SEALED:
            return None
        for store in (self._dst, os.path.join(self._dst, state.STAGE)):
            if any(os.path.lexists(os.path.join(store, META, name)) for name in (NAME, COPY)):
                return store
        return None

    def of_target(self, stage: Stage) -> Side:
        """Return DST's side; a sealed one gets its keyring here, in the stage, if it has none. Raises EncfsError."""
        goal = self._forms[1]
        if goal is Form.PLAIN:
            return Side(goal)
        if goal is Form.SERVER:
            return Side(goal, server_keys=[self._secret[1]])
        if self._keys is None:
            kind, key = self._secret
            document = keyring.create(key, kind=kind, cipher=self._cipher or Suite.CHACHAPOLY, plaintext="refuse")
            keystore.write(stage.path, document)
            _, self._keys = unlock(stage.path, key)
            state.found(stage.path, self._keys, time.time_ns())
        return _sealed_side("", self._keys, self._cipher)


def _sealed_side(store: str, keys: Keys, cipher: Suite | None) -> Side:
    """Return the side of a sealed store; what a crash has left in it is read as the next mount would read it."""
    settings = keys.settings
    file_keys = FileKeys(keys.volume_key, cipher or settings.cipher, settings.epoch)
    if not store:
        return Side(Form.SEALED, file_keys=file_keys)
    run = state.load(store, keys)
    windows = run.windows if run.clean else (*run.windows, (run.began, time.time_ns()))
    touched = state.State(run.clean, run.began, windows).touched
    return Side(Form.SEALED, file_keys=file_keys, plaintext=settings.plaintext == "read", touched=touched)


def _check_server_keys(io: Backing, store: str, found: Survey, keys: list[bytes]) -> None:
    """Raise WrongKeyError when the keys open not one of the store's meta.key files."""
    problem: WrongKeyError | None = None
    for path in found.keys:
        fd = io.open(os.path.join(os.fsencode(store), path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            raw = bytearray(128)
            raw = raw[: io.preadv(fd, [raw], 0)]
        finally:
            io.close(fd)
        asset = place_of(path).asset
        if asset is None or len(raw) not in serverkeys.KEY_FILES:
            continue
        try:
            serverkeys.open_key_file(bytes(raw), asset, keys, os.fsdecode(path))
            return
        except WrongKeyError as exc:
            problem = problem or exc
    if problem is not None:
        raise WrongKeyError(str(problem), hint=f"Nothing was written. {problem.hint}")


# -- what came of it


def _report(src: str, dst: str, forms: tuple[Form, Form], found: Survey, result: room.Result, *, as_json: bool) -> None:
    outcome, records = result.outcome, result.records
    if as_json:
        said: dict[str, Any] = {
            "source": src,
            "target": dst,
            "from": forms[0].value,
            "to": forms[1].value,
            "done": result.done,
            "files": found.plain_files,
            "bytes": found.size,
            "kept": outcome.kept,
            "failed": [{"file": os.fsdecode(path), "why": why} for path, why, _ in outcome.failed],
            "left_out": [os.fsdecode(path) for path, _ in outcome.left_out],
            "unequal": [{"file": os.fsdecode(path), "why": why} for path, why in result.unequal],
            "changed": [os.fsdecode(path) for path in result.changed],
            "records": None if records is None else records.as_json(),
        }
        print(json.dumps(said, indent=1))
    for path, why in outcome.left_out:
        _warn(f"{shown(path)} was left out: {why}")
    if outcome.no_owner:
        _warn(f"the owner of {plural(outcome.no_owner, 'entry', 'entries')} is another one now: only root can keep it")
    if found.linked:
        _warn(f"{plural(found.linked, 'name')} of hard linked files: each is a file of its own now")
    _complain(src, dst, result)
    if as_json:
        return
    print(
        f"{shown(dst)}: {plural(found.plain_files, 'file')}, {size(found.size)}, {forms[1].value}, equal to {shown(src)}"
    )
    if records is not None:
        streams = f"{plural(records.streams, 'stream')} and raft logs, {records.indexed} with a valid index.db"
        print(f"Read back: {streams}; {plural(records.blocks, 'block')}, {plural(records.records, 'record')}")
        for line in records.damaged:
            _warn(f"damaged in {src} as well: {line}")


def _warn(text: str) -> None:
    print(f"encfs-js: warning: {text}", file=sys.stderr)


def _complain(src: str, dst: str, result: room.Result) -> None:
    """Raise ConversionError for what is not done."""
    failed = result.outcome.failed
    if failed:
        for path, why, _ in failed:
            _warn(f"{shown(path)}: {why}")
        hint = next((hint for _, _, hint in failed if hint), "Restore them from a backup.")
        raise ConversionError(
            f"{src}: {plural(len(failed), 'file')} cannot be read: {', '.join(shown(path) for path, _, _ in failed[:3])}",
            hint=f"{hint} Then repeat the command: the other files are there already.",
        )
    if result.unequal:
        listed = ", ".join(f"{shown(path)} ({why})" for path, why in result.unequal[:3])
        raise ConversionError(
            f"{plural(len(result.unequal), 'file')} of {dst} not equal to those of {src}: {listed}",
            hint="Repeat the command. If it happens again, a disk or the memory of this machine is failing.",
        )
    if result.changed:
        listed = ", ".join(shown(path) for path in result.changed[:3])
        raise ConversionError(
            f"{src} was changed while it was converted: {listed}",
            hint="Stop who writes there (nats-server?), and repeat the command.",
        )
