"""The command mount."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from encfs_js import mount as room
from encfs_js.cli_key import ORDER, Source, SuiteType, key_options

if TYPE_CHECKING:
    from encfs_js.format import Suite


@click.command(epilog=ORDER)
@click.argument("store", required=False)
@click.argument("mountpoint", required=False)
@click.option("--foreground", is_flag=True, help="Stay in the foreground, with the log on stderr.")
@click.option("--read-only", is_flag=True, help="Refuse every change.")
@click.option(
    "--cipher",
    type=SuiteType(),
    metavar="CIPHER",
    help="Seal new files with chachapoly or aes; old keep theirs.",
)
@click.option(
    "--allow-other/--no-allow-other",
    default=None,
    help="Let other users in. Default: yes when root mounts, no otherwise.",
)
@click.option(
    "--writeback/--no-writeback",
    default=None,
    help="Let the kernel collect writes until a sync, or hand every write to the daemon at once. Default: collect.",
)
@click.option("--log-file", metavar="FILE", help="Append the daemon's log to this file.")
@key_options
def mount(
    *,
    source: Source,
    store: str | None,
    mountpoint: str | None,
    foreground: bool,
    read_only: bool,
    cipher: Suite | None,
    allow_other: bool | None,
    writeback: bool | None,
    log_file: str | None,
) -> int:
    """Show the plain content of STORE at MOUNTPOINT.

    MOUNTPOINT is an empty directory. Returns when the mount serves. STORE and MOUNTPOINT may stand in the file of
    --config instead.
    """
    config = source.config
    store = source.store(store)
    mountpoint = mountpoint or config.mountpoint
    if mountpoint is None:
        raise click.UsageError("Missing argument 'MOUNTPOINT'.", click.get_current_context())
    room.check_store(store)
    room.check_mountpoint(store, mountpoint)
    _, keys = source.unlock(store)
    if allow_other is None:
        allow_other = os.geteuid() == 0 if config.allow_other is None else config.allow_other
    if writeback is None:
        writeback = config.writeback is not False
    options = room.Options(
        store=store,
        mountpoint=mountpoint,
        cipher=cipher or config.jetstream.cipher,
        read_only=read_only or config.read_only,
        writeback=writeback,
        allow_other=allow_other,
        log_file=log_file or config.log_file,
    )
    return room.mount(options, keys, foreground=foreground)
