"""Mounting for a daemon that may not: what the unit's privileged steps do, as root and in the mount namespace of PID 1.

The daemon of the unit has no capability, no /dev/fuse and a mount namespace of its own, in which nobody else would see a
mount. So it is given one: /dev/fuse is opened and mounted here, and handed to the service manager, which passes it on
(sd_pid_notify_with_fds(3), FDSTORE=1). Until the daemon serves, and after it has died, whoever touches the mountpoint
waits or fails: nothing here touches it then.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Final

from encfs_js.errors import MountFailedError, MountpointError
from encfs_js.mount import check_mountpoint, check_store
from encfs_js.mounts import FS_TYPE, find, find_store, mounts

if TYPE_CHECKING:
    from encfs_js.mounts import MountEntry
    from encfs_js.notify import Notify

NAME: Final = "fuse"  # of the descriptor, as the supervisor looks for it
_DEVICE: Final = "/dev/fuse"
_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_PATIENCE: Final = 10.0  # seconds
_DYING: Final = 0.5  # seconds within which the workers of a supervisor that died are dead as well
_ANSWER: Final = 3.0  # seconds after which a mount that does not answer is one whose daemon hangs
_TICK: Final = 0.05
_libc: Final = ctypes.CDLL(None, use_errno=True)


# -- before the daemon


def prepare(store: str, mountpoint: str) -> None:
    """Take away what a daemon that died has left, and see that `store` can be mounted at `mountpoint`.

    Raises NotAStoreError, StoreUnsuitableError and MountpointError, as `encfs-js mount` does.
    """
    check_store(store)
    clear(store, mountpoint)
    entry = find(mountpoint)
    if entry is not None:
        raise MountpointError(
            f"{entry.source} is mounted at {mountpoint} already", hint=f"encfs-js umount {mountpoint}"
        )
    check_mountpoint(store, mountpoint)


def mount(store: str, mountpoint: str, *, read_only: bool, allow_other: bool, owner: tuple[int, int] | None) -> int:
    """Mount, with nobody to serve it yet, and return the descriptor of /dev/fuse, which has to be served.

    owner: whom the mount belongs to, None for the owner of the store; without allow_other nobody else may enter.
    Raises MountFailedError.
    """
    source = os.path.realpath(store)
    found = os.stat(source)
    uid, gid = owner or (found.st_uid, found.st_gid)
    try:
        fuse = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise MountFailedError(
            f"{_DEVICE}: {exc.strerror}",
            hint="modprobe fuse; a unit needs DeviceAllow=/dev/fuse rw, a container the device",
        ) from None
    options = [f"fd={fuse}", "rootmode=40000", f"user_id={uid}", f"group_id={gid}", "default_permissions"]
    if allow_other:
        options.append("allow_other")
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if read_only else 0)
    what = (os.fsencode(source), os.fsencode(os.path.realpath(mountpoint)), FS_TYPE.encode())
    if _libc.mount(*what, ctypes.c_ulong(flags), ",".join(options).encode()):
        code = ctypes.get_errno()
        os.close(fuse)
        raise MountFailedError(
            f"{mountpoint}: the mount was refused: {os.strerror(code)}",
            hint="only root may do this, outside of a sandbox",
        )
    return fuse


def hand_over(fuse: int, notify: Notify) -> None:
    """Put the descriptor into the service manager's store, and wait until it is there. Raises MountFailedError."""
    notify.say("FDSTORE=1", f"FDNAME={NAME}", fds=[fuse])
    _await_manager(notify)


def take_back(notify: Notify) -> None:
    """Take the descriptor out of the service manager's store: a daemon that never served has left it there.

    Then nobody has it, and the kernel ends the connection. Raises MountFailedError.
    """
    notify.say("FDSTOREREMOVE=1", f"FDNAME={NAME}")
    _await_manager(notify)


def _await_manager(notify: Notify) -> None:
    """Wait until the service manager has read what was said."""
    ours, theirs = os.pipe()
    notify.say("BARRIER=1", fds=[theirs])
    os.close(theirs)
    poll = select.poll()
    poll.register(ours, 0)  # it is closed when the message is read
    answered = poll.poll(_PATIENCE * 1000)
    os.close(ours)
    if not answered:
        raise MountFailedError("the service manager does not answer", hint="systemctl status, journalctl _PID=1")


# -- after the daemon


def clear(store: str, mountpoint: str) -> bool:
    """Take away a mount of `store` that nobody serves any more. Returns whether there was one; one that is served stays."""
    entry = find_store(store, mountpoint)
    if entry is None:
        return False
    deadline = time.monotonic() + _DYING
    while not _is_dead(entry.mountpoint):
        if time.monotonic() > deadline:
            return False
        time.sleep(_TICK)
    _unmount(entry.mountpoint, _MNT_DETACH)
    return True


def _is_dead(mountpoint: str) -> bool:
    """Tell whether the kernel has no connection to a daemon any more. Another process asks: it may have to wait for ever."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.statvfs(mountpoint)
        except OSError as exc:
            code = 0 if exc.errno in {errno.ENOTCONN, errno.ECONNABORTED} else 1
        finally:
            os._exit(code)
    poll = select.poll()
    fd = os.pidfd_open(child)
    poll.register(fd, select.POLLIN)
    ended = poll.poll(_ANSWER * 1000)
    os.close(fd)
    if not ended:
        os.kill(child, signal.SIGKILL)  # and it is not waited for
        return False
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def force(entry: MountEntry) -> None:
    """Unmount though it is in use: what was written is handed to the daemon first, then every user gets errors.

    Raises MountFailedError.
    """
    minor = entry.device.split(":")[1]
    try:
        fd = os.open(entry.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        os.sync()  # without allow_other not even root may open it
    else:
        _libc.syncfs(fd)
        os.close(fd)
    deadline = time.monotonic() + _PATIENCE
    while _waiting(minor) and time.monotonic() < deadline:
        time.sleep(_TICK)
    _unmount(entry.mountpoint, _MNT_FORCE)  # ends the connection, also when it answers that the mount is busy
    if any(left.device == entry.device and left.mountpoint == entry.mountpoint for left in mounts()):
        _unmount(entry.mountpoint, _MNT_DETACH)


def _waiting(minor: str) -> bool:
    """Tell whether requests are on their way: syncfs(2) does not wait for what the daemon was given to write."""
    try:
        with open(f"/sys/fs/fuse/connections/{minor}/waiting", encoding="ascii") as file:
            return int(file.read()) > 0
    except (OSError, ValueError):
        time.sleep(1)  # nobody can say
        return False


def _unmount(mountpoint: str, how: int) -> None:
    if not _libc.umount2(os.fsencode(mountpoint), how | _UMOUNT_NOFOLLOW):
        return
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOENT} or (code == errno.EBUSY and how == _MNT_FORCE):
        return  # it is gone by now, or will be detached
    raise MountFailedError(f"{mountpoint} was not unmounted: {os.strerror(code)}", hint="only root may do this")
