"""The command verify."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import click

from encfs_js import census, cli_servercheck, keyring, keystore, metacheck, state
from encfs_js import verify as verification
from encfs_js.backing import META, Backing
from encfs_js.cli_key import ORDER, Source, key_options
from encfs_js.cli_servercheck import late, meaning, told
from encfs_js.cli_serverkey import prev_key_option
from encfs_js.cli_text import plural, shown, size
from encfs_js.errors import DamageFoundError, StoreIoError
from encfs_js.format import PAGE, missing
from encfs_js.meter import Meter
from encfs_js.pool import cores

if TYPE_CHECKING:
    from encfs_js.keyring import Keys
    from encfs_js.metacheck import Own
    from encfs_js.verify import Damage, Report

_SHOWN: Final = 20  # plain files that the text output names


@click.command(epilog=ORDER)
@click.argument("store", required=False)
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), metavar="MIB", help="Read at most so many MiB a second."
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Work with so many processes; without it, one for each core.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@prev_key_option
@key_options
def verify(
    *,
    source: Source,
    store: str | None,
    rate: float | None,
    jobs: int | None,
    as_json: bool,
    prev_key_file: str | None,
) -> None:
    """Authenticate every page of every file in STORE.

    What is damaged is named by file and page, and of message blocks by stream, block and the messages that may be lost. Writes
    nothing. STORE may be mounted and in use meanwhile: what is written during the walk is seen as it was before or after; what
    fails is looked at again before it is called damaged.

    STORE may also be a store as nats-server keeps it, plain or encrypted by itself: then whatever has a tag, a hash or a form is
    checked, and the key is nats-server's.
    """
    if rate is not None and math.isnan(rate):
        raise click.BadParameter("not a number", click.get_current_context(), param_hint="'--rate'")
    store = source.store(store)
    work = jobs or cores(), None if rate is None else rate * (1 << 20)
    if not os.path.lexists(os.path.join(store, META)) and census.is_store(Backing(), store):
        cli_servercheck.verify(source, store, prev_key_file, *work, as_json=as_json)
        return
    keystore.load(store)  # nobody should be asked for the key of what is no store
    opened, keys, warning = keystore.unlock_store(store, source.key())
    busy = state.holder(store) is not None
    with ExitStack() as stack:
        report = verification.verify(
            Backing(),
            store,
            keys,
            touched=_windows(store, keys).touched,
            newer=lambda: keyring.renew(keystore.load(store)[0], keys),
            busy=busy,
            jobs=work[0],
            meter=Meter(*work),
            show=late(stack, as_json),
        )
    own = metacheck.check(Backing(), store, keys, busy=busy, used=report.files > 0)
    if warning:
        own.warnings.insert(0, warning)
    if as_json:
        print(json.dumps({"store": store, "store_id": opened.store_id.hex(), **_verified(report, own)}, indent=1))
    else:
        _print_verified(store, report, own)
    _judge(store, report, own)


def _judge(store: str, report: Report, own: Own) -> None:
    """Raise what there is to say at the end."""
    pages = sum(damage.pages for damage in report.damage)
    files = len({damage.path for damage in report.damage})
    found = [f"{plural(pages, 'page')} of {plural(files, 'file')} damaged"] if pages else []
    if own.damage:
        found.append(f"{plural(len(own.damage), 'file')} of encfs_js's own damaged")
    if found:
        raise DamageFoundError(
            f"{store}: {', '.join(found)}",
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


def _verified(report: Report, own: Own) -> dict[str, Any]:
    return {
        "sound": not report.damage and not report.unreadable and not own.damage,
        "files": report.files,
        "empty": report.empty,
        "pages": report.pages,
        "sealed_bytes": report.pages * PAGE,
        "plain_bytes": report.plain,
        "plaintext_files": report.plaintext_files,
        "plaintext_bytes": report.plaintext_bytes,
        "suites": dict(sorted(report.suites.items())),
        "epochs": {str(epoch): count for epoch, count in sorted(report.epochs.items())},
        "damage": [_damage(damage) for damage in report.damage],
        "own_damage": [{"file": os.fsdecode(path), "error": error} for path, error in own.damage],
        "crashed": [{"file": os.fsdecode(path), "page": page} for path, page in report.crashed],
        "unfinished": [os.fsdecode(path) for path in report.unfinished],
        "unreadable": [{"path": os.fsdecode(path), "error": error} for path, error in report.unreadable],
        "plaintext": [{"file": os.fsdecode(path), "bytes": count} for path, count in report.plaintext],
        "warnings": own.warnings,
    }


def _damage(damage: Damage) -> dict[str, Any]:
    return {
        "file": os.fsdecode(damage.path),
        "page": damage.page,
        "pages": damage.pages,
        "plaintext": damage.plain,
        **meaning(damage.subject, damage.lost),
    }


def _told(damage: Damage) -> str:
    """Say what a damaged page means, with a colon before it; "" where there is nothing to say."""
    parts = told(damage.subject, damage.lost)
    if damage.plain:
        parts.append("a plain file, which this store refuses")
    return f": {', '.join(parts)}" if parts else ""


def _print_verified(store: str, report: Report, own: Own) -> None:
    for damage in report.damage:
        last = f"-{damage.page + damage.pages - 1}" if damage.pages > 1 else ""
        print(f"damaged: {shown(damage.path)} page {damage.page}{last}{_told(damage)}")
    for path, error in own.damage:
        print(f"damaged: {shown(path)}: {error}")
    for path, page in report.crashed:
        print(f"unclean stop: {shown(path)} from page {page} on was never synced; the next mount cuts it there")
    for path in report.unfinished:
        print(f"unclean stop: {shown(path)} was being rewritten; the next mount finishes that")
    for path, error in report.unreadable:
        print(f"unreadable: {shown(path)}: {error}")
    left = [(path, count) for path, count in report.plaintext if report.plaintext_files]
    for path, count in left[:_SHOWN]:
        print(f"not sealed: {shown(path)}, {size(count)}")
    if len(left) > _SHOWN:
        print(f"not sealed: {len(left) - _SHOWN} more; --json names them all")
    for warning in own.warnings:
        print(f"warning: {shown(warning)}")
    if not report.damage and not report.unreadable and not own.damage:
        print(f"{shown(store)}: every page is authentic")
    counts = [f"{count} {name}" for name, count in sorted(report.suites.items())]
    counts += [f"{count} of epoch {epoch}" for epoch, count in sorted(report.epochs.items())]
    print(f"  {plural(report.files, 'file')}" + (f": {', '.join(counts)}" if counts else ""))
    print(f"  {plural(report.pages, 'page')}, {size(report.pages * PAGE)}, {size(report.plain)} of it plain text")
    if report.empty:
        print(f"  {plural(report.empty, 'empty file')}")
    if report.plaintext_files:
        print(f"  {plural(report.plaintext_files, 'file')} not sealed yet, {size(report.plaintext_bytes)}")
