"""The command inspect."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from encfs_js import inspect as inspection
from encfs_js import keystore, state
from encfs_js.backing import Backing
from encfs_js.cli_text import plural, shown, size
from encfs_js.keydocument import Kdf, Pbkdf2

if TYPE_CHECKING:
    from encfs_js.inspect import Survey
    from encfs_js.keyring import Keyring


@click.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(store: str, as_json: bool) -> None:
    """Say what STORE is, without a key.

    Its keyring, and its files by cipher and epoch. Nothing of this is authenticated: `verify` does that.
    """
    opened, warning = keystore.load(store)
    epochs = frozenset(epoch.epoch for epoch in opened.epochs)
    survey = inspection.survey(Backing(), store, epochs, plaintext=opened.settings.plaintext == "read")
    holder = state.holder(store)
    if as_json:
        print(json.dumps({"store": store, "warning": warning or None, **_inspected(opened, survey, holder)}, indent=1))
        return
    _print_keyring(store, opened, warning, holder)
    _print_survey(survey)


def _inspected(opened: Keyring, survey: Survey, holder: dict[str, object] | None) -> dict[str, Any]:
    return {
        "store_id": opened.store_id.hex(),
        "mounted": holder,
        "settings": {
            "cipher": opened.settings.cipher.label,
            "plaintext": opened.settings.plaintext,
            "epoch": opened.settings.epoch,
        },
        "epochs": [{"epoch": e.epoch, "created": e.created} for e in opened.epochs],
        "slots": [
            {
                "id": s.id,
                "kind": s.kind,
                "label": s.label,
                "created": s.created,
                "argon2id": asdict(s.kdf) if isinstance(s.kdf, Kdf) else None,
                **({"pbkdf2": asdict(s.kdf)} if isinstance(s.kdf, Pbkdf2) else {}),
            }
            for s in opened.slots
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
    rest = [plural(count, kind) for kind, count in sorted(survey.others.items())]
    rest = [plural(survey.directories, "directory", "directories"), plural(survey.empty, "empty file"), *rest]
    print(f"  {', '.join(rest)}")
    for path, why in survey.foreign:
        print(f"  foreign: {shown(path)}: {why}")
    for path, error in survey.unreadable:
        print(f"  unreadable: {shown(path)}: {error}")
