"""A mount's life: what must hold before, starting, serving, stopping so that nothing is lost, and being left dead on a crash."""

from __future__ import annotations

import ctypes
import json
import logging
import logging.handlers
import os
import resource
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from encfs_js import errors, redo, session, state
from encfs_js.backing import Backing
from encfs_js.errors import EncfsError, MountFailedError, MountpointError, NotAStoreError, StoreUnsuitableError
from encfs_js.files import Files
from encfs_js.fs import Operations
from encfs_js.guard import Guard
from encfs_js.mounts import FS_TYPE, mounts
from encfs_js.reserve import Reserve
from encfs_js.sealed import FileKeys
from encfs_js.tree import Tree

if TYPE_CHECKING:
    from encfs_js.format import Suite
    from encfs_js.keyring import Keys

log: Final = logging.getLogger("encfs_js")
_RETRY_UNMOUNT: Final = 0.5
_HOUSEKEEPING: Final = 5.0
# Each may wait for a disk (a sync, a cold read) while the others go on; each has a buffer of 1 MiB.
_TASKS: Final = 24


@dataclass(frozen=True, slots=True)
class Options:
    """How to mount. cipher: for new files, None for what the keyring says. log_file: None for stderr or syslog."""

    store: str
    mountpoint: str
    cipher: Suite | None = None
    read_only: bool = False
    writeback: bool = True
    allow_other: bool = False
    log_file: str | None = None


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
    """Raise MountpointError unless `mountpoint` is an empty directory apart from the store."""
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
    if any(m.mountpoint == real_mountpoint and m.fs_type == FS_TYPE for m in mounts()):
        raise MountpointError(f"{mountpoint} is mounted already", hint=f"encfs-js umount {mountpoint}")
    if names:
        raise MountpointError(
            f"{mountpoint} is not empty: what is in it would be hidden",
            hint="name an empty directory, or move its content away",
        )


# -- starting


def mount(options: Options, keys: Keys, *, foreground: bool) -> int:
    """Mount and serve until unmounted. In the background: return 0 as soon as the mount serves.

    Raises an EncfsError when it cannot be mounted; then nothing in the store was changed.
    """
    check_store(options.store)
    check_mountpoint(options.store, options.mountpoint)
    options = replace(options, store=os.path.realpath(options.store), mountpoint=os.path.realpath(options.mountpoint))
    if foreground:
        return _serve(options, keys, None)
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return _await_start(reader)
    os.close(reader)
    os.setsid()
    code = 1
    try:
        code = _serve(options, keys, writer)
    except EncfsError as exc:
        report = {"error": type(exc).__name__, "message": str(exc), "hint": exc.hint}
        os.write(writer, json.dumps(report).encode())
    finally:
        os._exit(code)


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


def _detach_from_terminal() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.chdir("/")


def configure_log(options: Options, *, foreground: bool) -> None:
    """Send the log to the file that was asked for, else to stderr (journald priorities under systemd), else to syslog."""
    handler: logging.Handler
    if options.log_file is not None:
        handler = logging.FileHandler(options.log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    elif foreground:
        handler = logging.StreamHandler()
        handler.setFormatter(_JournalFormatter() if os.environ.get("JOURNAL_STREAM") else _LINE)
    elif os.path.exists("/dev/log"):
        handler = logging.handlers.SysLogHandler("/dev/log")
        handler.setFormatter(logging.Formatter("encfs-js[%(process)d]: %(message)s"))
    else:
        handler = logging.NullHandler()
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


_LINE: Final = logging.Formatter("encfs-js: %(levelname)s: %(message)s")
_PRIORITIES: Final = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines() or [""]
        priority = _PRIORITIES.get(record.levelno, 5)
        return "\n".join(f"<{priority}>{line}" for line in lines)


def _limits() -> None:
    """As many descriptors as we may have (one an open file), no core dump (it would hold keys), modes as callers give them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0)


def _serve(options: Options, keys: Keys, ready: int | None) -> int:
    configure_log(options, foreground=ready is None)
    _limits()
    io = Backing()
    held = state.lock(options.store, options.mountpoint, _now().isoformat(timespec="seconds"))
    tree = Tree(io, options.store, Guard(options.store), give_to_caller=os.geteuid() == 0)
    redo_key = keys.derive(redo.INFO)
    file_keys = FileKeys(keys.volume_key, options.cipher or keys.settings.cipher, keys.settings.epoch)
    run = state.load(options.store, keys)
    reserve = None
    if not options.read_only:
        reserve = Reserve(io, tree.meta_fd)
        run = reserve.make_room_for(lambda: state.begin(options.store, keys, time.time_ns()))
        for line in redo.recover(io, tree.root_fd, tree.meta_fd, redo_key):
            log.warning("%s", line)
    files = Files(
        tree, file_keys, run, redo_key, reserve, _now,
        plaintext=keys.settings.plaintext == "read", writeback=options.writeback,
    )  # fmt: skip
    operations = Operations(tree, files, writeback=options.writeback, read_only=options.read_only)
    before = session.fuse_descriptors()
    try:
        pyfuse3.init(operations, options.mountpoint, _fuse_options(options))
    except RuntimeError:
        if reserve is not None:
            reserve.make_room_for(lambda: state.save(options.store, keys, replace(run, clean=True)))
        raise MountFailedError(
            f"{options.mountpoint}: the kernel or fusermount3 refused the mount",
            hint="look at the line above; encfs-js mount needs /dev/fuse and the package fuse3",
        ) from None
    for fd in session.fuse_descriptors() - before:
        session.answer_promptly(fd)
    log.info(
        "%s mounted at %s, %s, epoch %d", options.store, options.mountpoint, file_keys.suite.label, file_keys.epoch
    )
    try:
        trio.run(_main, options, keys, operations, files, reserve, run, ready)
    except BaseException:
        # Dead, never bare: an unmounted directory would look like an empty store, and take plaintext.
        log.critical("%s: the daemon has failed and leaves the mount dead", options.mountpoint, exc_info=True)
        pyfuse3.close(unmount=False)
        raise
    pyfuse3.close(unmount=False)
    files.close_all()
    if reserve is not None:
        _syncfs(tree.root_fd)
        last = files.swept or run
        reserve.make_room_for(lambda: state.save(options.store, keys, replace(last, clean=True)))
    os.close(held)
    log.info("%s unmounted", options.mountpoint)
    return 0


def _fuse_options(options: Options) -> set[str]:
    chosen = {"default_permissions", "subtype=encfs_js"}
    if options.store.isascii():
        chosen.add("fsname=" + options.store.replace("\\", "\\\\").replace(",", "\\,"))
    else:
        chosen.add("fsname=encfs_js")
    if options.allow_other:
        chosen.add("allow_other")
    if options.read_only:
        chosen.add("ro")
    return chosen


async def _tune_when_answered(operations: Operations, mountpoint: str) -> None:
    """Tune the mount, but not before FUSE_INIT is answered: the answer sets it all anew."""
    await operations.answered.wait()
    _tune(mountpoint)


def _tune(mountpoint: str) -> None:
    """Ask the kernel for larger reads and more requests at a time, where we may (root); it works without."""
    device = next((m.device for m in mounts() if m.mountpoint == mountpoint and m.fs_type == FS_TYPE), None)
    if device is None:
        return
    minor = device.split(":")[1]
    for path, value in (
        # 128 KiB reads become 1 MiB reads (18 instead of 64 for a 16 MiB file).
        (f"/sys/class/bdi/{device}/read_ahead_kb", "1024"),
        (f"/sys/fs/fuse/connections/{minor}/max_background", "64"),
        (f"/sys/fs/fuse/connections/{minor}/congestion_threshold", "48"),
    ):
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(value)
        except OSError as exc:
            log.debug("%s: %s", path, exc.strerror)


# -- serving and stopping


async def _main(
    options: Options,
    keys: Keys,
    operations: Operations,
    files: Files,
    reserve: Reserve | None,
    run: state.State,
    ready: int | None,
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, options.mountpoint)
        nursery.start_soon(_tune_when_answered, operations, options.mountpoint)
        if reserve is not None:
            nursery.start_soon(_keep_house, options, keys, files, reserve, run)
        if ready is not None:
            _detach_from_terminal()
            os.write(ready, b"ready")
            os.close(ready)
        await pyfuse3.main(max_tasks=_TASKS)
        nursery.cancel_scope.cancel()


async def _stop_on_signal(mountpoint: str) -> None:
    """Unmount on SIGTERM or SIGINT: the kernel then writes back what it holds. A second signal unmounts lazily."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        asked = 0
        async for _ in signals:
            asked += 1
            while (code := await _unmount(mountpoint, lazy=asked > 1)) != 0:
                log.warning("%s is busy: it will be unmounted when the last file is closed", mountpoint)
                with trio.move_on_after(_RETRY_UNMOUNT):
                    await signals.__anext__()
                    asked += 1
            if code == 0:
                return


async def _unmount(mountpoint: str, *, lazy: bool) -> int:
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), mountpoint]
    done = await trio.run_process(
        command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PATH": os.defpath}
    )
    return done.returncode


async def _keep_house(options: Options, keys: Keys, files: Files, reserve: Reserve, run: state.State) -> None:
    """After an unclean stop look at every file it may have touched; then see to the reserve from time to time.

    What a disk refuses here is no reason to stop serving: it is said, and tried again.
    """
    if run.windows:
        try:
            for _ in files.sweep():
                await trio.lowlevel.checkpoint()
            if not files.not_swept:
                swept = replace(run, windows=())
                reserve.make_room_for(lambda: state.save(options.store, keys, swept))
                files.swept = swept
                log.info("after the unclean stop: every file was looked at, %d were cut", files.trimmed)
        except OSError as exc:
            log.warning("the look at the files after the unclean stop is not finished: %s", exc.strerror)
    while True:
        await trio.sleep(_HOUSEKEEPING)
        try:
            files.refill()
        except OSError as exc:
            log.warning("the reserve: %s", exc.strerror)


def _syncfs(fd: int) -> None:
    if ctypes.CDLL(None, use_errno=True).syncfs(fd):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _now() -> datetime:
    return datetime.now(UTC)
