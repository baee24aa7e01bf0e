"""The commands that are about systemd: installing the units, and the steps of the unit that the daemon itself may not do."""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from typing import TYPE_CHECKING, Final

import click

from encfs_js import cli_mount, cli_status, config, mounts, premount, state
from encfs_js.errors import ConfigError, EncfsError, MountBusyError, MountFailedError
from encfs_js.logs import to_journal
from encfs_js.notify import Notify

if TYPE_CHECKING:
    from collections.abc import Callable

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")
_UNIT: Final = re.compile(r"[A-Za-z0-9_.@:-]+\.service\Z")
_COMMAND: Final = "/usr/bin/env encfs-js"  # as the files in systemd/ have it
_EXAMPLE: Final = "orders"  # the same: the name of the instance
_TPM_BLOCK: Final = re.compile(r"^  # tpm:\n(?:  #   .*\n)+", re.MULTILINE)  # in orders.yaml
_PLAIN_PATH: Final = re.compile(r"[A-Za-z0-9_/.+@-]+\Z")
_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  by the sandbox of the unit
_BUSY: Final = 5.0  # seconds that a mount may stay busy at a stop: who was stopped before may not be quite gone
_TICK: Final = 0.1


@click.group()
def systemd() -> None:
    """Install the systemd units, and do their privileged steps."""


# -- install


@systemd.command()
@click.argument("name", required=False)
@click.option(
    "--for",
    "server",
    metavar="UNIT",
    default="nats-server.service",
    help="The unit that requires the mount. Default: nats-server.service.",
)
@click.option("--tpm", is_flag=True, help="Also a drop-in with which the instance NAME gets its key from the TPM.")
@click.option("--root", metavar="DIR", default="/", help="Write below DIR, as packagers do. Default: /.")
def install(name: str | None, server: str, tpm: bool, root: str) -> None:
    """Copy the unit, its user and mount.encfs_js to where they belong.

    With NAME also a configuration of that instance, if there is none, and a drop-in that makes nats-server's unit
    require it. Starts nothing, and prints what to type next.
    """
    if name is not None and not _NAME.match(name):
        raise ConfigError(f"{name}: not a name for an instance", hint="letters, digits, _ . and -")
    if tpm and name is None:
        raise click.UsageError("--tpm needs the NAME of an instance.", click.get_current_context())
    if not _UNIT.match(server):
        raise ConfigError(f"{server}: not the name of a service", hint="as in nats-server.service")
    command = _own_command()
    os.umask(0o022)
    if os.path.realpath(root) == "/":
        _check_reach()
    files = [
        ("encfs-js@.service", "/etc/systemd/system/encfs-js@.service", 0o644),
        ("encfs-js.sysusers", "/etc/sysusers.d/encfs-js.conf", 0o644),
        ("mount.encfs_js", "/usr/sbin/mount.encfs_js", 0o755),
    ]
    if name is not None:
        files += [
            ("orders.yaml", f"/etc/encfs-js/{name}.yaml", 0o644),
            ("nats-server.conf", f"/etc/systemd/system/{server}.d/encfs-js.conf", 0o644),
        ]
    if tpm:
        files.append(("tpm.conf", f"/etc/systemd/system/encfs-js@{name}.service.d/10-tpm.conf", 0o644))
    for source, target, mode in files:
        with open(os.path.join(_directory(), source), encoding="utf-8") as file:
            text = file.read().replace(_COMMAND, command)
        if source in {"orders.yaml", "nats-server.conf", "tpm.conf"}:
            text = re.sub(rf"\b{_EXAMPLE}\b", str(name), text)
        if tpm and source == "orders.yaml":
            text = _TPM_BLOCK.sub(lambda block: block[0].replace("  # ", "  "), text)
        path = os.path.join(root, target.lstrip("/"))
        done = _write(path, text, mode, replace=not target.endswith(".yaml"))
        print(f"{done:<9} {path}")
    _print_next(name, server, tpm=tpm)


def _directory() -> str:
    """Return where the files to install are: in the package when it was installed, beside it in the repository."""
    package = os.path.dirname(os.path.abspath(__file__))
    inside = os.path.join(package, "systemd")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), "systemd")


def _own_command() -> str:
    """Return how a unit starts this very installation."""
    script = os.path.join(os.path.dirname(sys.executable), "encfs-js")
    words = [script] if os.access(script, os.X_OK) else [sys.executable, "-m", "encfs_js"]
    if not all(_PLAIN_PATH.match(word) for word in words):
        raise ConfigError(f"{words[0]}: a unit cannot name this path", hint="install encfs-js in /opt/encfs-js")
    return " ".join(words)


def _check_reach() -> None:
    """Raise ConfigError when the daemon, in its sandbox and as its own user, could not run this installation."""
    for part in (
        sys.executable,
        os.path.realpath(sys.executable),
        os.path.dirname(os.path.abspath(__file__)),
    ):
        above = part
        while above != "/":
            closed = not os.stat(above).st_mode & stat.S_IXOTH
            if closed or above in _HIDDEN:
                why = "is closed to other users" if closed else "is hidden by the unit's sandbox"
                hint = "python3 -m venv /opt/encfs-js, with a Python that lies in /usr or /opt, and install it there"
                raise ConfigError(f"the daemon could not reach {part}: {above} {why}", hint=hint)
            above = os.path.dirname(above)


def _write(path: str, text: str, mode: int, *, replace: bool) -> str:
    """Write a file as a whole. Returns what was done."""
    try:
        with open(path, encoding="utf-8") as file:
            same = file.read() == text
    except FileNotFoundError:
        done = "written"
    else:
        if same or not replace:
            return "unchanged" if same else "kept"
        done = "replaced"
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with open(fd, "w", encoding="utf-8") as file:
        os.fchmod(fd, mode)
        file.write(text)
    os.rename(path + ".new", path)
    return done


def _print_next(name: str | None, server: str, *, tpm: bool) -> None:
    lines = ["systemd-sysusers", "systemctl daemon-reload"]
    if name is None:
        lines.append("encfs-js systemd install NAME")
    else:
        settings = f"/etc/encfs-js/{name}.yaml"
        lines += [
            f"install -d -m 555 /var/lib/nats/{name}   # or what you have made of mountpoint and owner in {settings}",
            "install -d -m 755 /var/lib/encfs-js",
        ]
        if tpm:
            secret, sealed = f"/etc/encfs-js/{name}.env", f"/var/lib/encfs-js/{name}.tpm"
            lines += [
                f'(umask 077; echo "TPM_PASSWORD=$(head -c 32 /dev/urandom | base64)" > {secret})',
                f"(set -a; . {secret}; encfs-js init --config {settings} && encfs-js key add --config {settings} --recovery)",
                f"chown encfs-js: {sealed}",
            ]
        else:
            key = f"/etc/credstore/encfs-js.{name}.key"
            lines += [
                f"(umask 077; mkdir -p /etc/credstore; head -c 32 /dev/urandom | base64 > {key})",
                f"encfs-js init --config {settings} --key-file {key}",
            ]
        lines += [
            f"systemctl enable --now encfs-js@{name}.service",
            f"systemctl restart {server}   # with store_dir: /var/lib/nats/{name} in nats-server's configuration",
        ]
    print("Next:")
    for line in lines:
        print(f"    {line}")


# -- the steps of the unit


def _mount(chosen: config.Config, store: str, mountpoint: str) -> None:
    """Before the start: mount, and hand /dev/fuse to the service manager for the daemon."""
    notify = _manager()
    owner = config.find_owner(chosen.owner) if chosen.owner is not None else None
    premount.take_back(notify)
    premount.prepare(store, mountpoint)
    fuse = premount.mount(
        store,
        mountpoint,
        read_only=chosen.read_only,
        allow_other=chosen.allow_other is not False,
        owner=owner,
    )
    premount.hand_over(fuse, notify)


def _manager() -> Notify:
    if "NOTIFY_SOCKET" not in os.environ:
        raise MountFailedError(
            "there is no service manager", hint="this is a step of encfs-js@.service: systemctl start"
        )
    return Notify(os.environ)


def _tune(_: config.Config, store: str, mountpoint: str) -> None:
    """After the start: what only root may set."""
    entry = mounts.find_store(store, mountpoint)
    if entry is not None:
        mounts.tune(entry.mountpoint)


def _reload(_: config.Config, store: str, mountpoint: str) -> None:
    """Replace the worker."""
    entry = mounts.find_store(store, mountpoint)
    _call(cli_mount.reload, entry.mountpoint if entry is not None else mountpoint)


def _unmount(_: config.Config, store: str, mountpoint: str) -> None:
    """To stop: unmount, and by force when somebody still uses it. nats-server was stopped before."""
    deadline = time.monotonic() + _BUSY
    while (entry := mounts.find_store(store, mountpoint)) is not None:
        try:
            _call(cli_status.umount, entry.mountpoint)
        except MountBusyError as problem:
            if time.monotonic() > deadline:
                _warn(f"{problem}; it is unmounted all the same, and whoever uses it gets errors")
                premount.force(entry)
                while state.holder(entry.source) is not None:
                    time.sleep(_TICK)  # the daemon still writes to the disk
                return
            time.sleep(_TICK)


def _clear(_: config.Config, store: str, mountpoint: str) -> None:
    """After the end: a daemon that died, or never served, has left its mount."""
    premount.take_back(_manager())
    if premount.clear(store, mountpoint):
        _warn(f"{mountpoint}: nobody served it any more; the mount was taken away")


_STEPS: Final = {"mount": _mount, "tune": _tune, "reload": _reload, "unmount": _unmount, "clear": _clear}


@systemd.command()
@click.argument("step", type=click.Choice(list(_STEPS)))
@click.argument("config_file", metavar="CONFIG")
def step(step: str, config_file: str) -> None:
    """Do one STEP of encfs-js@.service for the mount that CONFIG describes.

    The unit calls this, as root and in the mount namespace of PID 1; only reload runs in its sandbox.
    """
    try:
        chosen = config.load(config_file, with_key=False)
        store, mountpoint = chosen.jetstream.store_dir, chosen.mountpoint
        if store is None or mountpoint is None:
            raise ConfigError(f"{config_file}: has no store_dir or no mountpoint", hint="a unit needs both")
        _STEPS[step](chosen, store, mountpoint)
    except MountFailedError:
        raise
    except EncfsError:
        # The daemon is about to find the same, and systemd judges only its exit code: whether a restart can help.
        if step != "mount":
            raise


def _call(command: click.Command, mountpoint: str) -> None:
    act: Callable[..., None] = command.callback  # type: ignore[assignment]
    act(mountpoint=mountpoint)


def _warn(text: str) -> None:
    print(f"{'<4>' if to_journal() else ''}encfs-js: warning: {text}", file=sys.stderr)
