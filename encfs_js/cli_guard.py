"""The commands that are about the guard: what it protects, and opening it again."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from encfs_js import guard as room
from encfs_js.cli_text import plural, shown
from encfs_js.errors import GuardClosedError

if TYPE_CHECKING:
    from encfs_js.guard import Closed


@click.group()
def guard() -> None:
    """See and open the guard over damaged streams.

    It closes by itself at the first page that does not authenticate: nothing below that stream's directory can be
    removed, renamed or cut until an operator has restored the file, or given it up, and opens the guard.
    """


def closed_as_json(closed: list[Closed]) -> list[dict[str, Any]]:
    """Return what JSON output says of closed guards."""
    return [
        {"directory": os.fsdecode(c.directory), "file": os.fsdecode(c.file), "page": c.page, "since": c.since}
        for c in closed
    ]


@guard.command("status")
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(store: str, as_json: bool) -> None:
    """List what is protected in STORE, and why.

    Exit code 26 when there is anything.
    """
    closed = room.read(store)
    if as_json:
        print(json.dumps({"closed": closed_as_json(closed)}, indent=1))
    else:
        for c in closed:
            print(f"{shown(c.directory)}: {room.subject(c.directory)}, since {c.since}: {shown(c.file)} page {c.page}")
        if not closed:
            print("open: nothing is protected")
    if closed:
        raise GuardClosedError(
            f"{store}: the guard is closed over {plural(len(closed), 'directory', 'directories')}",
            hint="Restore the files from a backup, or give them up; then: encfs-js guard clear STORE DIRECTORY",
        )


@guard.command("clear")
@click.argument("store")
@click.argument("directory", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def clear(store: str, directory: str | None, as_json: bool) -> None:
    """Open the guard over DIRECTORY, or all guards.

    DIRECTORY is a path in STORE, as `guard status` prints it. A running daemon notices. If a damaged page is met again,
    the guard closes again.
    """
    closed = room.read(store)
    name = None if directory is None else os.fsencode(directory)
    if name is not None and closed and name.strip(b"/") not in {c.directory for c in closed}:
        raise GuardClosedError(
            f"{store}: no guard is closed over {directory}",
            hint=f"Closed over: {', '.join(shown(c.directory) for c in closed)}",
        )
    count = room.clear(store, name)
    if as_json:
        print(json.dumps({"cleared": count}))
    else:
        print(f"{plural(count, 'guard')} opened")
