"""The command verify."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from encfs_js import keyring, keystore, state
from encfs_js import verify as verification
from encfs_js.backing import Backing
from encfs_js.cli_key import ORDER, Source, key_options
from encfs_js.cli_text import plural, shown, size
from encfs_js.errors import DamageFoundError, StoreIoError
from encfs_js.format import PAGE, missing

if TYPE_CHECKING:
    from encfs_js.keyring import Keys
    from encfs_js.verify import Report


@click.command(epilog=ORDER)
@click.argument("store", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@key_options
def verify(source: Source, store: str | None, as_json: bool) -> None:
    """Authenticate every page of every file in STORE.

    What is damaged is named by file and page. Writes nothing. STORE may be mounted and in use meanwhile: what is written
    during the walk is seen as it was before or after; what fails is looked at again before it is called damaged.
    """
    store = source.store(store)
    opened, keys = source.unlock(store)
    report = verification.verify(
        Backing(),
        store,
        keys,
        touched=_windows(store, keys).touched,
        newer=lambda: keyring.renew(keystore.load(store)[0], keys),
        busy=state.holder(store) is not None,
    )
    if as_json:
        print(json.dumps({"store": store, "store_id": opened.store_id.hex(), **_verified(report)}, indent=1))
    else:
        _print_verified(store, report)
    pages = sum(damage.pages for damage in report.damage)
    files = len({damage.path for damage in report.damage})
    if report.damage:
        raise DamageFoundError(
            f"{store}: {plural(pages, 'page')} of {plural(files, 'file')} damaged",
            hint="Restore those files from a backup of the store. A mount answers EIO for these pages and keeps "
            "nats-server from deleting the stream (see `encfs-js guard status`).",
        )
    if report.refused is not None:
        raise missing(report.refused)
    if report.unreadable:
        raise StoreIoError(
            f"{store}: {plural(len(report.unreadable), 'path')} could not be read; the rest is sound",
            hint="Run the command as the user that owns the store; see whether the disk is failing.",
        )


def _windows(store: str, keys: Keys) -> state.State:
    """Return the state that tells which files a crash may have touched; a run that died is one more window."""
    last = state.load(store, keys)
    if last.clean or state.holder(store) is not None:
        return last
    return replace(last, windows=(*last.windows, (last.began, time.time_ns())))


def _verified(report: Report) -> dict[str, Any]:
    return {
        "sound": not report.damage and not report.unreadable,
        "files": report.files,
        "empty": report.empty,
        "pages": report.pages,
        "sealed_bytes": report.pages * PAGE,
        "plain_bytes": report.plain,
        "plaintext_files": report.plaintext_files,
        "plaintext_bytes": report.plaintext_bytes,
        "suites": dict(sorted(report.suites.items())),
        "epochs": {str(epoch): count for epoch, count in sorted(report.epochs.items())},
        "damage": [{"file": os.fsdecode(d.path), "page": d.page, "pages": d.pages} for d in report.damage],
        "crashed": [{"file": os.fsdecode(path), "page": page} for path, page in report.crashed],
        "unfinished": [os.fsdecode(path) for path in report.unfinished],
        "unreadable": [{"path": os.fsdecode(path), "error": error} for path, error in report.unreadable],
    }


def _print_verified(store: str, report: Report) -> None:
    for damage in report.damage:
        last = f"-{damage.page + damage.pages - 1}" if damage.pages > 1 else ""
        print(f"damaged: {shown(damage.path)} page {damage.page}{last}")
    for path, page in report.crashed:
        print(f"unclean stop: {shown(path)} from page {page} on was never synced; the next mount cuts it there")
    for path in report.unfinished:
        print(f"unclean stop: {shown(path)} was being rewritten; the next mount finishes that")
    for path, error in report.unreadable:
        print(f"unreadable: {shown(path)}: {error}")
    if not report.damage and not report.unreadable:
        print(f"{shown(store)}: every page is authentic")
    counts = [f"{count} {name}" for name, count in sorted(report.suites.items())]
    counts += [f"{count} of epoch {epoch}" for epoch, count in sorted(report.epochs.items())]
    print(f"  {plural(report.files, 'file')}" + (f": {', '.join(counts)}" if counts else ""))
    print(f"  {plural(report.pages, 'page')}, {size(report.pages * PAGE)}, {size(report.plain)} of it plain text")
    if report.empty:
        print(f"  {plural(report.empty, 'empty file')}")
    if report.plaintext_files:
        print(f"  {plural(report.plaintext_files, 'file')} not sealed yet, {size(report.plaintext_bytes)}")
