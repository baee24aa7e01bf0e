"""The commands that begin a mount and renew its worker: mount and reload."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import click

from encfs_js import config as configuration
from encfs_js import control
from encfs_js import mount as room
from encfs_js.cli_key import ORDER, Source, SuiteType, key_options
from encfs_js.errors import ConfigError, NotMountedError, ReloadFailedError
from encfs_js.mounts import find

if TYPE_CHECKING:
    from encfs_js.format import Suite
    from encfs_js.mounts import MountEntry

_PATIENCE: Final = 120.0  # seconds: the tree of a large store is walked


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
    "--owner",
    metavar="USER[:GROUP]",
    help="Show what belongs to the daemon's user as this user's. Default: the daemon's own.",
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
    owner: str | None,
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
    given = {"cipher": cipher, "log_file": log_file, "allow_other": allow_other, "writeback": writeback, "owner": owner}
    given["read_only"] = read_only or None
    if allow_other is None:
        allow_other = os.geteuid() == 0 if config.allow_other is None else config.allow_other
    if writeback is None:
        writeback = config.writeback is not False
    owner = owner or config.owner
    options = room.Options(
        store=store,
        mountpoint=mountpoint,
        cipher=cipher or config.jetstream.cipher,
        read_only=read_only or config.read_only,
        writeback=writeback,
        allow_other=allow_other,
        owner=configuration.find_owner(owner) if owner is not None else None,
        log_file=log_file or config.log_file,
        config=source.config_file,
        given=tuple(name for name, value in given.items() if value is not None),
    )
    return room.mount(options, keys, foreground=foreground)


@click.command()
@click.argument("mountpoint")
def reload(mountpoint: str) -> None:
    """Go on serving MOUNTPOINT with the code and configuration now installed.

    A new worker takes the place of the one that serves. Nothing is unmounted, and whoever uses the mount sees a pause of a
    fraction of a second. The configuration file that
    the mount was made with is read again. What it cannot change in a mount that stands is an error.
    """
    entry = find(mountpoint)
    if entry is None:
        raise NotMountedError(
            f"{mountpoint}: no encfs_js store is mounted there", hint="`encfs-js status` lists what is mounted."
        )
    options = _ask(entry, {"do": "status"})["options"]
    if options["config"] is not None:
        options = _renewed(options, configuration.load(options["config"], with_key=False))
    answer = _ask(entry, {"do": "reload", "options": options})
    print(f"{entry.mountpoint} is served by the new worker {answer['worker']}.")


def _renewed(options: dict[str, Any], config: configuration.Config) -> dict[str, Any]:
    """Return a worker's options with what the configuration says now. Raises ConfigError for what needs a new mount."""
    cipher = config.jetstream.cipher
    wanted = {
        "cipher": cipher.label if cipher is not None else None,
        "log_file": os.path.abspath(config.log_file) if config.log_file is not None else None,
        "read_only": config.read_only,
        "writeback": config.writeback is not False,
        "allow_other": options["allow_other"] if config.allow_other is None else config.allow_other,
        "owner": list(configuration.find_owner(config.owner)) if config.owner is not None else None,
    }
    given = options["given"]
    changed = {name: value for name, value in wanted.items() if name not in given and value != options.get(name)}
    for name in ("read_only", "writeback", "allow_other", "owner"):
        if name in changed:
            raise ConfigError(
                f"{options['config']}: $.{name}: cannot change in a mount that stands",
                hint=f"encfs-js umount {options['mountpoint']}, and mount again.",
            )
    return options | changed


def _ask(entry: MountEntry, message: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = control.ask(entry.source, message, _PATIENCE)
    except OSError as problem:
        raise ReloadFailedError(
            f"{entry.mountpoint}: its daemon does not answer: {problem.strerror or problem}",
            hint=f"encfs-js status {entry.mountpoint} shows whether it lives. Run the command as root or as who mounted it.",
        ) from None
    if not answer["ok"]:
        reason = answer.get("message") or answer["how"]
        raise ReloadFailedError(
            f"{entry.mountpoint}: {reason}; the mount goes on as before",
            hint=answer.get("hint") or "the log of the mount says more",
        )
    return answer
