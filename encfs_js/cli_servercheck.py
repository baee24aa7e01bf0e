"""What the command verify does with a store as nats-server keeps it, and what it shares with it for stores of ours."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from encfs_js import servercheck
from encfs_js.backing import Backing
from encfs_js.cli_progress import display
from encfs_js.cli_serverkey import server_keys
from encfs_js.cli_text import plural, shown, size
from encfs_js.errors import DamageFoundError, StoreIoError, WrongKeyError
from encfs_js.meter import Meter

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.cli_key import Source
    from encfs_js.impact import Lost, Subject
    from encfs_js.servercheck import Report

_SHOWN: Final = 20  # plain files that the text output names


def late(stack: ExitStack, as_json: bool) -> Callable[[dict[str, Any]], None] | None:
    """Return a function that shows progress, None where nobody would see it; the bar, a thread, starts when it is first called.

    By then the processes are there that do the work: none of them should be forked while another thread runs.
    """
    if as_json or not os.isatty(2):
        return None
    shows: list[Callable[[dict[str, Any]], None]] = []

    def show(progress: dict[str, Any]) -> None:
        if not shows:
            shows.append(stack.enter_context(display(as_json)))
        shows[0](progress)

    return show


def meaning(about: Subject, lost: Lost | None) -> dict[str, Any]:
    """Return what a file is, and what is lost of it, for a program."""
    return {
        "what": about.what or ("message block" if about.block is not None else None),
        "account": about.account,
        "stream": about.stream,
        "raft_group": about.group,
        "consumer": about.consumer,
        "block": about.block,
        "sequences": None if lost is None else [list(each) for each in lost.ranges],
    }


def told(about: Subject, lost: Lost | None) -> list[str]:
    """Say what a file is, and what is lost of it; nothing where there is nothing to say."""
    parts = [str(about)] if str(about) else []
    if lost is not None:
        parts.append(lost.told("log entries" if about.group is not None else "messages"))
    return parts


def verify(
    source: Source, store: str, prev_key_file: str | None, jobs: int, rate: float | None, *, as_json: bool
) -> None:
    """Check a store as nats-server keeps it, and say what was found. The key is asked for only if there are key files."""
    io = Backing()
    encrypted = servercheck.has_keys(io, store)
    keys = server_keys(source, prev_key_file) if encrypted else []
    with ExitStack() as stack:
        report = servercheck.check(io, store, keys, jobs=jobs, meter=Meter(jobs, rate), show=late(stack, as_json))
    if report.locked:
        raise WrongKeyError(
            f"{store}: the key opens no key file of this store",
            hint="Give the `key` that nats-server has in its configuration, and with --prev-key-file the one before.",
        )
    kind = "encrypted by nats-server" if encrypted else "plain"
    if as_json:
        print(json.dumps({"store": store, "kind": "server" if encrypted else "plain", **_as_json(report)}, indent=1))
    else:
        _print(store, report, kind)
    if report.damage:
        files = len({damage.path for damage in report.damage})
        raise DamageFoundError(
            f"{store}: {plural(files, 'file')} damaged",
            hint="Restore those files from a backup before nats-server starts: it cuts blocks at the first bad record, and may "
            "remove a stream that it cannot read.",
        )
    if report.unreadable:
        raise StoreIoError(
            f"{store}: {plural(len(report.unreadable), 'path')} could not be read; the rest is sound",
            hint="Run the command as the user that owns the store; see whether the disk is failing.",
        )


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "sound": not report.damage and not report.unreadable,
        "files": report.files,
        "bytes": report.size,
        "blocks": report.blocks,
        "records": report.records,
        "ciphers": dict(sorted(report.ciphers.items())),
        "damage": [
            {
                "file": os.fsdecode(damage.path),
                "offset": damage.offset,
                "why": damage.why,
                **meaning(damage.subject, damage.lost),
            }
            for damage in report.damage
        ],
        "torn": [{"file": os.fsdecode(path), "offset": offset} for path, offset in report.torn],
        "unreadable": [{"path": os.fsdecode(path), "error": error} for path, error in report.unreadable],
        "plaintext": [{"file": os.fsdecode(path), "bytes": count} for path, count in report.plaintext],
        "warnings": report.warnings,
    }


def _print(store: str, report: Report, kind: str) -> None:
    for damage in report.damage:
        parts = ", ".join(told(damage.subject, damage.lost))
        print(
            f"damaged: {shown(damage.path)} byte {damage.offset}: {shown(damage.why)}" + (f": {parts}" if parts else "")
        )
    for path, offset in report.torn:
        print(f"unclean stop: {shown(path)} ends within a record at byte {offset}; nats-server cuts it there")
    for path, error in report.unreadable:
        print(f"unreadable: {shown(path)}: {error}")
    for path, count in report.plaintext[:_SHOWN]:
        print(f"in the clear: {shown(path)}, {size(count)}")
    if len(report.plaintext) > _SHOWN:
        print(f"in the clear: {len(report.plaintext) - _SHOWN} more; --json names them all")
    for warning in report.warnings:
        print(f"warning: {shown(warning)}")
    if not report.damage and not report.unreadable:
        print(f"{shown(store)}: every record is as its hash says")
    ciphers = [f"{count} {name}" for name, count in sorted(report.ciphers.items())]
    print(f"  {kind}: {plural(report.files, 'file')}" + (f": {', '.join(ciphers)}" if ciphers else ""))
    print(f"  {plural(report.blocks, 'block')}, {plural(report.records, 'record')}, {size(report.size)}")
