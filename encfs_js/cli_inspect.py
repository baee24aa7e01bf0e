"""The command inspect."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from encfs_js import census as rolls
from encfs_js import cli_census, holdings, keysource, keystore, state
from encfs_js import inspect as inspection
from encfs_js.backing import Backing
from encfs_js.cli_key import Source, key_options
from encfs_js.cli_serverkey import prev_key_option, server_keys
from encfs_js.cli_text import plural, shown, size
from encfs_js.errors import EncfsError, NotAStoreError, WrongKeyError
from encfs_js.keydocument import Kdf, Pbkdf2
from encfs_js.sealed import FileKeys
from encfs_js.unsealing import Unsealed

if TYPE_CHECKING:
    from encfs_js.inspect import Survey
    from encfs_js.keyring import Keyring

_ORDER = (
    "The key comes from the first of: --key-file, --credential, --tpm, the file of --config (a key, or a tpm block), the "
    "environment variable JS_KEY. Nobody is asked for it. Of a store that nats-server has encrypted itself it is the `key` of "
    "nats-server's configuration."
)


@click.command(epilog=_ORDER)
@click.argument("store", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@prev_key_option
@key_options
def inspect(source: Source, prev_key_file: str | None, store: str | None, as_json: bool) -> None:
    """Say what is in STORE, with and without a key.

    Its keyring; its files by mode, cipher and epoch; its accounts, streams, consumers and raft groups; with the key also their
    messages and configuration. STORE may also be one that nats-server has encrypted itself, or a plain one, and may be in use.
    Nothing of this is authenticated: `verify` does that.
    """
    store = source.store(store)
    io = Backing()
    try:
        opened, warning = keystore.load(store)
    except NotAStoreError:
        if not rolls.is_store(io, store):
            raise
        opened, warning = None, ""
    keys = _Keys()
    if _is_given(source):
        keys = _found_keys(source, prev_key_file, store, opened)
    found = _look(io, store, opened, keys)
    holder = state.holder(store) if opened is not None else None
    kind = "sealed" if opened is not None else "server" if found.told["key_files"] else "plain"
    if as_json:
        answer = {
            "store": store,
            "warning": warning or None,
            **_inspected(opened, found.survey, holder),
            "kind": kind,
            "half_sealed": opened is not None and state.is_half_sealed(store),
            **found.told,
        }
        print(json.dumps(answer, indent=1))
    else:
        if opened is not None:
            _print_keyring(store, opened, warning, holder)
            _print_survey(found.survey)
        else:
            print(
                f"{shown(store)}: a JetStream store, " + ("encrypted by nats-server" if kind == "server" else "plain")
            )
            cli_census.print_modes(found.told["modes"])
            _print_rest(found.survey)
        cli_census.print_told(found.told)
    if found.problem is not None:
        raise found.problem


@dataclass(slots=True)
class _Keys:
    """What was given: keys of sealed files, keys of nats-server's own encryption; problem: why it is none."""

    files: FileKeys | None = None
    server: tuple[bytes, ...] = ()
    problem: EncfsError | None = None

    def __repr__(self) -> str:
        """Show no key."""
        return "_Keys(...)"


@dataclass(slots=True)
class _Found:
    """survey, and what cli_census.tell returns. problem: what the command ends with."""

    survey: Survey
    told: dict[str, Any]
    problem: EncfsError | None


def _is_given(source: Source) -> bool:
    """Tell whether there is a key without anybody being asked for it."""
    block = source.config.jetstream
    given = (source.key_file, source.credential, block.tpm, block.key)
    return any(each is not None for each in given) or keysource.VARIABLE in os.environ


def _found_keys(source: Source, prev_key_file: str | None, store: str, opened: Keyring | None) -> _Keys:
    """Return the keys that open a store. A wrong one is told when the rest was shown; raises KeyMissingError and the TPM's."""
    key = source.key()
    if opened is None:
        return _Keys(server=tuple(server_keys(source, prev_key_file, key)))
    try:
        _, keys, _ = keystore.unlock_store(store, key)
    except EncfsError as problem:
        return _Keys(problem=problem)
    files = FileKeys(keys.volume_key, keys.settings.cipher, keys.settings.epoch)
    server = server_keys(source, prev_key_file, key) if state.is_half_sealed(store) else ()
    return _Keys(files, tuple(server))


def _look(io: Backing, store: str, opened: Keyring | None, keys: _Keys) -> _Found:
    epochs = None if opened is None else frozenset(epoch.epoch for epoch in opened.epochs)
    half = opened is not None and state.is_half_sealed(store)
    plaintext = opened is None or half or opened.settings.plaintext == "read"
    census = rolls.Census(io, keys.server)
    survey = inspection.survey(io, store, epochs, plaintext=plaintext, each=census.take)
    problem, server = keys.problem, keys.server
    if server and census.wrong and not census.opened:
        server = ()
        census.unopened.clear()
        if not half:
            problem = WrongKeyError(
                f"{store}: the key opens none of nats-server's {plural(census.key_files, 'key file')}",
                hint="Give the `key` that nats-server has in its configuration. Nothing was written.",
            )
    survey.unreadable += census.unopened
    busy = opened is not None and state.holder(store) is not None
    with rolls.opened(io, store) as top:
        reader = holdings.Reader(Unsealed(io, keys.files), top, server, busy=busy)
        told = cli_census.tell(census, reader)
    known = {path for path, _ in survey.unreadable}
    survey.unreadable += [each for each in reader.unreadable if each[0] not in known]
    return _Found(survey, told, problem)


def _inspected(opened: Keyring | None, survey: Survey, holder: dict[str, object] | None) -> dict[str, Any]:
    return {
        "store_id": None if opened is None else opened.store_id.hex(),
        "mounted": holder,
        "settings": None
        if opened is None
        else {
            "cipher": opened.settings.cipher.label,
            "plaintext": opened.settings.plaintext,
            "epoch": opened.settings.epoch,
        },
        "epochs": [{"epoch": e.epoch, "created": e.created} for e in (opened.epochs if opened else ())],
        "slots": [
            {
                "id": s.id,
                "kind": s.kind,
                "label": s.label,
                "created": s.created,
                "argon2id": asdict(s.kdf) if isinstance(s.kdf, Kdf) else None,
                **({"pbkdf2": asdict(s.kdf)} if isinstance(s.kdf, Pbkdf2) else {}),
            }
            for s in (opened.slots if opened else ())
        ],
        "files": [
            {
                "suite": name,
                "epoch": epoch,
                "files": group.files,
                "pages": group.pages,
                "sealed_bytes": group.sealed,
                "plain_bytes": group.plain,
            }
            for (name, epoch), group in sorted(survey.groups.items())
        ],
        "empty_files": survey.empty,
        "plaintext_files": survey.plaintext_files,
        "plaintext_bytes": survey.plaintext_bytes,
        "directories": survey.directories,
        "others": dict(sorted(survey.others.items())),
        "symlinks": [os.fsdecode(path) for path in survey.symlinks],
        "foreign": [{"file": os.fsdecode(path), "why": why} for path, why in survey.foreign],
        "unreadable": [{"path": os.fsdecode(path), "error": error} for path, error in survey.unreadable],
    }


def _print_keyring(store: str, opened: Keyring, warning: str, holder: dict[str, object] | None) -> None:
    settings = opened.settings
    print(f"{shown(store)}: store {opened.store_id.hex()}")
    print(f"  new files: {settings.cipher.label}, epoch {settings.epoch}; plaintext: {settings.plaintext}")
    for epoch in opened.epochs:
        print(f"  epoch {epoch.epoch}: made {epoch.created}")
    for slot in opened.slots:
        kdf, cost = slot.kdf, ""
        if isinstance(kdf, Kdf):
            cost = f", argon2id {kdf.iterations} x {kdf.memory_kib // 1024} MiB x {kdf.lanes}"
        elif kdf is not None:
            cost = f", pbkdf2 {kdf.iterations}"
        label = f" {slot.label!r}" if slot.label else ""
        print(f"  slot {slot.id}: {slot.kind}{label}, made {slot.created}{cost}")
    if holder is not None:
        print(f"  mounted at {shown(str(holder.get('mountpoint')))} by process {holder.get('pid')}")
    if warning:
        print(f"  warning: {warning}")


def _print_survey(survey: Survey) -> None:
    for (name, epoch), group in sorted(survey.groups.items()):
        print(
            f"  {name}, epoch {epoch}: {plural(group.files, 'file')}, {plural(group.pages, 'page')}, "
            f"{size(group.sealed)}, {size(group.plain)} of it plain text"
        )
    if survey.plaintext_files:
        print(f"  not sealed: {plural(survey.plaintext_files, 'file')}, {size(survey.plaintext_bytes)}")
    _print_rest(survey)


def _print_rest(survey: Survey) -> None:
    rest = [plural(count, kind) for kind, count in sorted(survey.others.items())]
    rest = [plural(survey.directories, "directory", "directories"), plural(survey.empty, "empty file"), *rest]
    print(f"  {', '.join(rest)}")
    for path in survey.symlinks:
        print(f"  symlink, not followed: {shown(path)}")
    for path, why in survey.foreign:
        print(f"  foreign: {shown(path)}: {why}")
    for path, error in survey.unreadable:
        print(f"  unreadable: {shown(path)}: {shown(error)}")
