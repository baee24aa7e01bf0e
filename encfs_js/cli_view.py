"""The command view: what nats-server has encrypted itself, shown in the clear and read-only."""

from __future__ import annotations

import os
import sys

import click

from encfs_js import view as room
from encfs_js.backing import Backing
from encfs_js.cli_key import ORDER, Source, key_options
from encfs_js.cli_serverkey import prev_key_option, server_keys
from encfs_js.cli_text import plural


@click.command(epilog=ORDER)
@click.argument("store", required=False)
@click.argument("mountpoint", required=False)
@click.option("--foreground", is_flag=True, help="Stay in the foreground, with the log on stderr.")
@click.option(
    "--allow-other/--no-allow-other",
    default=None,
    help="Let other users in, as far as the modes of the files allow. Default: yes when root mounts, no otherwise.",
)
@click.option("--log-file", metavar="FILE", help="Append the log of the view to this file.")
@prev_key_option
@key_options
def view(
    *,
    source: Source,
    store: str | None,
    mountpoint: str | None,
    foreground: bool,
    allow_other: bool | None,
    log_file: str | None,
    prev_key_file: str | None,
) -> int:
    """Show what nats-server has encrypted in STORE in the clear at MOUNTPOINT.

    STORE is what nats-server has as its store_dir, with encryption at rest of its own, and the key is nats-server's. The view
    has the same files in the clear; a nats-server without a key starts with a copy of it. STORE may be in use; what is copied
    then is as after a crash. MOUNTPOINT is an empty directory. Returns when the view is served; `encfs-js umount` ends it.
    """
    config = source.config
    store = source.store(store)
    mountpoint = mountpoint or config.mountpoint
    if mountpoint is None:
        raise click.UsageError("Missing argument 'MOUNTPOINT'.", click.get_current_context())
    room.check(store, mountpoint)
    found = room.key_files(Backing(), store)
    keys = server_keys(source, prev_key_file) if found else []
    problems = room.check_keys(found, keys)
    if not found:
        _warn(f"{store}: there is no key file of nats-server in it, so nothing in it is encrypted")
    if problems and not foreground:
        _warn(f"{len(problems)} of {plural(len(found), 'key file')} cannot be opened; the log of the view names them")
    if allow_other is None:
        allow_other = os.geteuid() == 0 if config.allow_other is None else config.allow_other
    return room.show(
        store,
        mountpoint,
        keys,
        problems,
        foreground=foreground,
        allow_other=allow_other,
        log_file=log_file or config.log_file,
    )


def _warn(text: str) -> None:
    print(f"encfs-js: warning: {text}", file=sys.stderr)
