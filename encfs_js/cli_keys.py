"""The commands about the keyring's slots: each is a key of its own to the same store, and none needs the store unmounted."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import stat
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import click

from encfs_js import control, keydocument, keyring, keystore, state
from encfs_js.cli_key import ORDER, New, Source, key_options, new_options, unlock
from encfs_js.cli_text import plural, shown
from encfs_js.errors import (
    CipherMissingError,
    KeyringDamagedError,
    SlotError,
    StoreBusyError,
    StoreIoError,
    WrongKeyError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.keyring import Keyring, Keys

_TRIES: Final = 10  # that the slots may change under a command's hands
_PATIENCE: Final = 30.0  # seconds that the daemon of a mounted store may take


class _MovedError(Exception):
    """The slots are not those any more that the command has looked at."""


def _label(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and (not value.isprintable() or len(value) > keydocument.MAX_LABEL):
        raise click.BadParameter(f"must be one line of at most {keydocument.MAX_LABEL} characters.")
    return value


_label_option = click.option("--label", metavar="TEXT", callback=_label, help="A note about the key. No secret.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def key() -> None:
    """See and change which keys open a store.

    A store has one or more keys, each in a slot of its keyring: key strings, the TPM, recovery codes. None of these
    commands touches a file of the store, and a store that is mounted stays mounted. Whoever has had an old keyring and a
    key to it can open the store for good: the key inside stays the same.
    """


@key.command("list")
@click.argument("store")
@_json_option
def list_slots(store: str, as_json: bool) -> None:
    """List the slots of STORE's keyring, without a key."""
    found, warning = keystore.load(store)
    if as_json:
        slots = [
            {"id": s.id, "kind": s.kind, "label": s.label, "created": s.created, "known": s.is_known}
            for s in found.slots
        ]
        answer = {"store": store, "store_id": found.store_id.hex(), "warning": warning or None, "slots": slots}
        print(json.dumps(answer, indent=1))
        return
    for slot in found.slots:
        label = f" {slot.label!r}" if slot.label else ""
        known = "" if slot.is_known else ", not known to this version"
        print(f"slot {slot.id}: {slot.kind}{label}, made {slot.created}{known}")
    if warning:
        print(f"encfs-js: warning: {warning}", file=sys.stderr)


@key.command(epilog=ORDER)
@click.argument("store", required=False)
@_label_option
@_json_option
@key_options
@new_options
def add(source: Source, new: New, store: str | None, label: str | None, as_json: bool) -> None:
    """Add a key to STORE, beside those that it has."""
    _check_shown(new)
    at = _opened(source.store(store), source, new)
    kind, secret = new.secret(source)
    number = _added(at, kind, secret, label)
    if kind == "recovery":
        _show_code(at, number, number, secret, as_json=as_json)
    _report(at, number, kind, "is new", as_json=as_json)


@key.command(epilog=ORDER)
@click.argument("store")
@click.argument("slot", type=int)
@_json_option
@key_options
def remove(source: Source, store: str, slot: int, as_json: bool) -> None:
    """Remove slot SLOT of STORE: its key opens the store no more.

    The last one stays. What is mounted stays mounted.
    """
    at = _opened(store, source)
    left = _changed(at, lambda: lambda found: keyring.remove_slot(found, at.keys, slot)).slots
    if as_json:
        print(json.dumps({"store": store, "removed": slot, "slots": [s.id for s in left]}, indent=1))
    else:
        print(f"{shown(store)}: slot {slot} is removed; left: {', '.join(f'{s.id} ({s.kind})' for s in left)}")


@key.command(epilog=ORDER)
@click.argument("store", required=False)
@click.option("--slot", type=int, help="Change this slot, and not the one that the present key opens.")
@_label_option
@_json_option
@key_options
@new_options
def change(source: Source, new: New, store: str | None, slot: int | None, label: str | None, as_json: bool) -> None:
    """Put a new key in place of the present one, or of another.

    The key that was there opens STORE no more; the slot keeps its number. Put the new key where `mount` takes it from.
    """
    _check_shown(new)
    at = _opened(source.store(store), source, new)
    number = at.keys.slot if slot is None else slot
    assert number is not None
    keyring.place(at.keyring, number)  # nothing is made for a slot that is not there
    kind, secret = new.secret(source)
    beside = None
    if kind == "recovery":
        # Beside the old key until the code is on paper: whenever this process dies, one of the two opens.
        beside = _added(at, kind, secret, label)
        _show_code(at, beside, number, secret, as_json=as_json)

    def plan() -> Callable[[Keyring], bytes]:
        if slot is None and at.keys.slot != number:
            raise SlotError(
                f"the key opens slot {at.keys.slot} now, no more slot {number}", hint="See: encfs-js key list STORE"
            )
        if beside is None:
            _refuse_known(at, secret)

        def replaced(found: Keyring) -> bytes:
            document = keyring.replace_slot(found, at.keys, number, kind, secret, label=label)
            return document if beside is None else keyring.remove_slot(keyring.parse(document), at.keys, beside)

        return replaced

    _changed(at, plan)
    _report(at, number, kind, "has the new key now; what it had before opens it no more", as_json=as_json)


@key.command()
@click.argument("store")
@click.argument("file")
@_json_option
def export(store: str, file: str, as_json: bool) -> None:
    """Write the keyring of STORE to a new file FILE.

    It is protected as the keyring in STORE is: by the keys that STORE has now, also when they are changed later. Keep it with
    the backups of STORE: `key import` takes back from it what was dropped meanwhile.
    """
    found, warning = keystore.load(store)
    if os.path.realpath(file).startswith(os.path.realpath(store) + os.sep):
        raise click.BadParameter("is in STORE, where it would count as a file of the store.", param_hint="FILE")
    keystore.export(file, keydocument.write_out(found))
    if warning:
        print(f"encfs-js: warning: {warning}", file=sys.stderr)
    epochs = [e.epoch for e in found.epochs]
    if as_json:
        print(json.dumps({"store": store, "file": file, "epochs": epochs}, indent=1))
    else:
        print(f"{shown(store)}: the keyring is in {shown(file)}, with {plural(len(epochs), 'epoch')}")


@key.command("import", epilog=ORDER)
@click.argument("store")
@click.argument("file")
@_json_option
@key_options
def import_epochs(source: Source, store: str, file: str, as_json: bool) -> None:
    """Take the epochs from FILE that STORE has no more.

    FILE is a keyring of this STORE that was exported, or is in a backup of it. Files from before an epoch was dropped can be
    read again then. The slots stay as they are.
    """
    exported = keystore.load_export(file)
    at = _opened(store, source)
    before: list[int] = []

    def plan() -> Callable[[Keyring], bytes | None]:
        before[:] = [e.epoch for e in at.keyring.epochs]
        try:
            keyring.take_epochs(at.keyring, at.keys, exported)
        except KeyringDamagedError as problem:
            raise KeyringDamagedError(f"{file}: {problem}", hint="Name a keyring of this very store.") from None
        missing = {e.epoch for e in exported.epochs} - set(before)
        return lambda found: keyring.take_epochs(found, at.keys, exported) if missing else None

    taken = [e.epoch for e in _changed(at, plan).epochs if e.epoch not in before]
    _rekey(store)
    if as_json:
        print(json.dumps({"store": store, "file": file, "taken": taken}, indent=1))
    elif taken:
        print(f"{shown(store)}: taken from {shown(file)}: {plural(len(taken), 'epoch')} ({', '.join(map(str, taken))})")
    else:
        print(f"{shown(store)} has every epoch of {shown(file)} already")


# -- changing a keyring that was looked at before


@dataclass(slots=True)
class Opened:
    """The keyring that a command works on, as it was when it was last looked at."""

    store: str
    key: bytes = field(repr=False)
    keyring: Keyring
    keys: Keys


def _opened(store: str, source: Source, new: New | None = None) -> Opened:
    keystore.load(store)  # nobody should be asked for the key of what is no store
    key = source.key(without_tpm=new is not None and new.tpm)
    return Opened(store, key, *unlock(store, key))


def _changed(at: Opened, plan: Callable[[], Callable[[Keyring], bytes | None]]) -> Keyring:
    """Change the keyring as `plan` says, which looks at it first. Returns what it is then.

    What takes long, the trying of keys, comes before the lock. When another command changes the slots meanwhile, the key is
    tried anew, and `plan` looks again: a key that was just removed changes nothing.
    """
    for _ in range(_TRIES):
        change = plan()

        def checked(found: Keyring, change: Callable[[Keyring], bytes | None] = change) -> bytes | None:
            keyring.renew(found, at.keys)  # or slots that somebody else wrote would pass for those of another command
            if found.slots != at.keyring.slots:
                raise _MovedError
            return change(found)

        try:
            at.keyring = keystore.update(at.store, checked)
        except _MovedError:
            at.keyring, at.keys = unlock(at.store, at.key)
        else:
            return at.keyring
    raise StoreBusyError(
        f"{at.store}: other commands change its keyring all the time", hint="Repeat the command when they have ended."
    )


def _added(at: Opened, kind: str, secret: bytes, label: str | None) -> int:
    """Add a slot; return its number."""

    def plan() -> Callable[[Keyring], bytes]:
        _refuse_known(at, secret)
        return lambda found: keyring.add_slot(found, at.keys, kind, secret, label=label or "")

    return _changed(at, plan).slots[-1].id


def _refuse_known(at: Opened, secret: bytes) -> None:
    """Raise SlotError when the secret has a slot: of two with one key, one would be removed in vain.

    What the OpenSSL of this host cannot try counts as another one.
    """
    with contextlib.suppress(WrongKeyError, CipherMissingError):
        number = keyring.opened_by(at.keyring, secret)
        raise SlotError(
            f"slot {number} has this key already",
            hint="Nothing was written. Give another one, or remove that slot first.",
        )


def _check_shown(new: New) -> None:
    """Refuse to make a recovery code for /dev/null, which stands also where stdout was closed: printing it would not fail."""
    out = os.fstat(1)
    if new.recovery and stat.S_ISCHR(out.st_mode) and out.st_rdev == os.stat(os.devnull).st_rdev:
        raise StoreIoError(
            "the recovery code would be printed to /dev/null, and be known to nobody",
            hint="Nothing was written. Repeat the command where its output can be read.",
        )


def _show_code(at: Opened, withdraw: int, number: int, secret: bytes, *, as_json: bool) -> None:
    """Print a recovery code that was written to slot `withdraw`. Where that fails, the slot is taken away again."""
    code = secret.decode()
    text = f"The recovery code, which is shown this once. It opens the store like a key:\n    {code}"
    if as_json:
        answer = {"store": at.store, "slot": number, "kind": "recovery", "recovery_code": code}
        text = json.dumps(answer, indent=1)
    try:
        print(text, flush=True)
    except OSError as problem:
        # Or the code would be tried to be printed again when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        _changed(at, lambda: lambda found: keyring.remove_slot(found, at.keys, withdraw))
        raise StoreIoError(
            f"the recovery code could not be printed: {problem.strerror}",
            hint="No slot has it any more, and all others are as they were. Repeat the command where its output can be read.",
        ) from None


def _report(at: Opened, number: int, kind: str, what: str, *, as_json: bool) -> None:
    if not as_json:
        print(f"{shown(at.store)}: slot {number} ({kind}) {what}")
    elif kind != "recovery":  # which was printed with its code
        print(json.dumps({"store": at.store, "slot": number, "kind": kind}, indent=1))


def _rekey(store: str) -> None:
    """Have the daemon of a mounted store take the epochs that its keyring has now."""
    holder = state.holder(store)
    if holder is None or not holder.get("mountpoint"):
        return
    try:
        answer = control.ask(store, {"do": "rekey"}, _PATIENCE)
    except OSError as problem:
        answer = {"ok": False, "how": problem.strerror or str(problem)}
    if not answer["ok"]:
        again = f"repeat the command, or mount {shlex.quote(store)} again"
        print(f"encfs-js: warning: the mount has not taken the epochs ({answer['how']}): {again}", file=sys.stderr)
