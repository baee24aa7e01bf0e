"""Starting a mount: what must hold before, and the supervisor that takes it from there."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

from encfs_js import errors, keymemory, keyring, keystore, notify, state
from encfs_js.errors import EncfsError, MountFailedError, MountpointError, NotAStoreError, StoreUnsuitableError
from encfs_js.format import check_available
from encfs_js.mounts import FS_TYPE, VIEW_TYPE, find_store, mounts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encfs_js.format import Suite
    from encfs_js.keyring import Keys

_KEY_VARIABLE: Final = "JS_KEY"
WORKER: Final = (sys.executable, "-m", "encfs_js.worker")


@dataclass(frozen=True, slots=True)
class Options:
    """How to mount. cipher: for new files, None for what the keyring says. log_file: None for stderr or syslog.

    owner: user and group that the mount shows in the place of the daemon's own.
    config: the file that a reload reads again; given: what the command line says and no configuration can change.
    """

    store: str
    mountpoint: str
    cipher: Suite | None = None
    read_only: bool = False
    writeback: bool = True
    allow_other: bool = False
    owner: tuple[int, int] | None = None
    log_file: str | None = None
    config: str | None = None
    given: tuple[str, ...] = ()


# -- what must hold before


def check_store(store: str) -> None:
    """Raise NotAStoreError unless `store` is a directory, StoreUnsuitableError if its file system cannot carry a store."""
    if not os.path.isdir(store):
        raise NotAStoreError(f"{store}: no such directory", hint=f"encfs-js init {store}")
    path = os.path.realpath(store)
    within = [m for m in mounts() if path == m.mountpoint or path.startswith(m.mountpoint.rstrip("/") + "/")]
    below = max(within, key=lambda m: len(m.mountpoint), default=None)
    if below is not None and below.fs_type == "overlay":
        raise StoreUnsuitableError(
            f"{store} lies on overlayfs, where a file changes its inode number and device when it is written",
            hint="put STORE on a volume of its own (ext4, xfs, btrfs, tmpfs), in a container on a mounted one",
        )


def check_mountpoint(store: str, mountpoint: str) -> None:
    """Raise MountpointError unless `mountpoint` is an empty directory apart from the store.

    When the service manager passes /dev/fuse, it is mounted already and nobody serves it yet: then it is not touched.
    """
    if notify.was_passed("fuse", os.environ):
        _real_mountpoint(store, mountpoint)
        return
    try:
        names = os.listdir(mountpoint)
    except FileNotFoundError:
        raise MountpointError(f"{mountpoint}: no such directory", hint=f"mkdir {mountpoint}") from None
    except NotADirectoryError:
        raise MountpointError(f"{mountpoint} is not a directory", hint="name an empty directory") from None
    except OSError as exc:
        raise MountpointError(
            f"{mountpoint} cannot be read: {exc.strerror}", hint=f"encfs-js umount {mountpoint}"
        ) from None
    real_store, real_mountpoint = os.path.realpath(store), os.path.realpath(mountpoint)
    for inner, outer, text in (
        (real_mountpoint, real_store, "lies inside the store"),
        (real_store, real_mountpoint, "contains the store"),
    ):
        if inner == outer or inner.startswith(outer.rstrip("/") + "/"):
            raise MountpointError(f"{mountpoint} {text} {store}", hint="name two directories side by side")
    if any(m.mountpoint == real_mountpoint and m.fs_type in {FS_TYPE, VIEW_TYPE} for m in mounts()):
        raise MountpointError(f"{mountpoint} is mounted already", hint=f"encfs-js umount {mountpoint}")
    if names:
        raise MountpointError(
            f"{mountpoint} is not empty: what is in it would be hidden",
            hint="name an empty directory, or move its content away",
        )


def _real_mountpoint(store: str, mountpoint: str) -> str:
    """Return the mountpoint as the kernel has it, or is to have it. Raises MountpointError."""
    if not notify.was_passed("fuse", os.environ):
        return os.path.realpath(mountpoint)
    entry = find_store(store, mountpoint)
    if entry is None:
        raise MountpointError(
            f"{mountpoint}: {store} is not mounted there, as far as can be seen from here",
            hint="the unit's sandbox hides what is below /home, /root, /run/user, /tmp and /var/tmp",
        )
    return entry.mountpoint


# -- starting


def mount(options: Options, keys: Keys, *, foreground: bool, worker: Sequence[str] = WORKER) -> int:
    """Mount and serve until unmounted. In the background: return 0 as soon as the mount serves.

    In the foreground this process becomes the supervisor, and the function does not return. Raises an EncfsError when it
    cannot be mounted; then nothing in the store was changed. worker: the command that starts one.
    """
    check_store(options.store)
    check_mountpoint(options.store, options.mountpoint)
    state.check_whole(options.store)
    if not options.read_only:
        check_available(options.cipher or keys.settings.cipher)
    options = replace(
        options,
        store=os.path.realpath(options.store),
        mountpoint=_real_mountpoint(options.store, options.mountpoint),
        log_file=os.path.abspath(options.log_file) if options.log_file is not None else None,
        config=os.path.abspath(options.config) if options.config is not None else None,
    )
    if foreground:
        _become_supervisor(options, keys, None, worker)
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return _await_start(reader)
    os.close(reader)
    os.setsid()
    try:
        _become_supervisor(options, keys, writer, worker)
    except EncfsError as exc:
        os.write(writer, json.dumps(exc.as_json()).encode())
    finally:
        os._exit(1)


def _await_start(reader: int) -> int:
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    if answer == b"ready":
        return 0
    if not answer:
        raise MountFailedError("the daemon died while it was starting", hint="try again with --foreground")
    report = json.loads(answer)
    kind: type[EncfsError] = getattr(errors, report["error"])
    raise kind(report["message"], hint=report["hint"])


def worker_options(options: Options, *, foreground: bool) -> dict[str, Any]:
    """Return what a worker has to know, as JSON has it."""
    return {
        "store": options.store,
        "mountpoint": options.mountpoint,
        "cipher": options.cipher.label if options.cipher is not None else None,
        "read_only": options.read_only,
        "writeback": options.writeback,
        "allow_other": options.allow_other,
        "owner": options.owner,
        "log_file": options.log_file,
        "config": options.config,
        "given": options.given,
        "foreground": foreground,
    }


def _become_supervisor(options: Options, keys: Keys, ready: int | None, worker: Sequence[str]) -> NoReturn:
    """Take the store, and put the supervisor in the place of this process, with the keys in memory that it inherits.

    Its environment, which others can read, is without the key.
    """
    held = state.lock(options.store, options.mountpoint, datetime.now(UTC).isoformat(timespec="seconds"))
    # Before it was ours another may have made a new epoch, sealed all files anew, and dropped the one that these keys know.
    found, _ = keystore.load(options.store)
    keys = keyring.renew(found, keys)
    if ready is not None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.chdir("/")
    chosen = worker_options(options, foreground=ready is None)
    orders = {
        **{name: chosen[name] for name in ("store", "mountpoint", "writeback", "log_file", "foreground")},
        "mount_options": _fuse_options(options),
        "worker": _memory("options", chosen),
        "keys": keymemory.keep(keys),
        "lock": held,
        "program": list(worker),
        "ready": ready,
    }
    number = _memory("orders", orders)
    for inherited in (number, orders["worker"], orders["keys"], held, ready):
        if inherited is not None:
            os.set_inheritable(inherited, True)
    environ = {name: value for name, value in os.environ.items() if name != _KEY_VARIABLE}
    command = [sys.executable, "-m", "encfs_js.supervisor", options.store, options.mountpoint, str(number)]
    os.execve(sys.executable, command, environ)  # noqa: S606


def _memory(name: str, document: dict[str, Any]) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, json.dumps(document).encode())
    return fd


def _fuse_options(options: Options) -> str:
    chosen = ["default_permissions", "subtype=encfs_js"]
    if options.store.isascii():
        chosen.append("fsname=" + options.store.replace("\\", "\\\\").replace(",", "\\,"))
    else:
        chosen.append("fsname=encfs_js")
    if options.allow_other:
        chosen.append("allow_other")
    if options.read_only:
        chosen.append("ro")
    return ",".join(chosen)
