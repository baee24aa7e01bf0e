"""The commands that look at the kernel's mounts: status and umount. Quick to start, and they never wait for a mount."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click

from encfs_js import control, guard, keystore, presence, state
from encfs_js.cli_guard import closed_as_json
from encfs_js.cli_text import plural, shown
from encfs_js.errors import EncfsError, MountBusyError, MountFailedError, NotMountedError
from encfs_js.mounts import FS_TYPE, VIEW_TYPE, MountEntry, find, mounts

if TYPE_CHECKING:
    from collections.abc import Iterator

_OURS: Final = (FS_TYPE, VIEW_TYPE)
_UMOUNT_NOFOLLOW: Final = 8
_PATIENCE_MS: Final = 2000
_BUSY: Final = 0.3  # seconds: the last user is gone, and its file is still being closed


@click.command()
@click.argument("mountpoint")
def umount(mountpoint: str) -> None:
    """Unmount MOUNTPOINT, and wait until all is in STORE."""
    entry = find(mountpoint, _OURS)
    if entry is None:
        raise NotMountedError(
            f"{mountpoint}: no encfs_js store is mounted there",
            hint="`encfs-js status` lists what is mounted.",
        )
    with _daemon(entry) as daemon:
        problem = _unmount(entry.mountpoint)
        until = time.monotonic() + _BUSY
        while problem == os.strerror(errno.EBUSY) and time.monotonic() < until:
            time.sleep(_BUSY / 10)
            problem = _unmount(entry.mountpoint)
        if problem is None:
            _wait_for(daemon)
            return
    if problem == os.strerror(errno.EBUSY):
        users = ", ".join(_users(entry.mountpoint))
        raise MountBusyError(
            f"{mountpoint} is in use" + (f" by {users}" if users else ""),
            hint=f"Stop what uses it (nats-server first) and repeat the command. To see all: fuser -vm {mountpoint}",
        )
    raise MountFailedError(
        f"{mountpoint} was not unmounted: {problem}",
        hint="Run the command as the user who mounted it, or as root.",
    )


def _unmount(mountpoint: str) -> str | None:
    """Unmount, by ourselves if we may, else through fusermount3. Returns what the problem is, None when it is done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not libc.umount2(os.fsencode(mountpoint), _UMOUNT_NOFOLLOW):
        return None
    if ctypes.get_errno() != errno.EPERM:
        return os.strerror(ctypes.get_errno())
    try:
        done = subprocess.run(
            ["fusermount3", "-u", "--", mountpoint],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        return "fusermount3 is not installed (Debian: apt-get install fuse3)"
    if done.returncode == 0:
        return None
    answer = done.stderr.strip().removeprefix("fusermount3: ")
    return os.strerror(errno.EBUSY) if os.strerror(errno.EBUSY).lower() in answer.lower() else answer


@contextlib.contextmanager
def _daemon(entry: MountEntry) -> Iterator[int | None]:
    """Hold on to the process that serves the mount: a pidfd, or None when it is not known or runs elsewhere."""
    fd = None
    with contextlib.suppress(OSError, ValueError, TypeError):
        pid = presence.server_of(entry) if entry.fs_type == VIEW_TYPE else _holder(entry)
        if pid is not None:
            fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _holder(entry: MountEntry) -> int | None:
    holder = state.holder(entry.source)
    if holder and holder.get("mountpoint") == entry.mountpoint and holder.get("host") == os.uname().nodename:
        return int(str(holder.get("pid")))
    return None


def _wait_for(daemon: int | None) -> None:
    """Wait until the daemon has synced the store and ended."""
    if daemon is None:
        return
    poll = select.poll()
    poll.register(daemon, select.POLLIN)
    if not poll.poll(_PATIENCE_MS):
        print("encfs-js: unmounted; the daemon still writes to the disk, waiting for its end", file=sys.stderr)
        poll.poll()


def _users(mountpoint: str) -> list[str]:
    """Name the processes that have something below the mountpoint open, as far as /proc shows them to us."""
    found = []
    for pid in sorted({int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}):
        with contextlib.suppress(OSError):
            links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
            links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
            if any(f"{_target(link)}/".startswith(f"{mountpoint}/") for link in links):
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                    found.append(f"{file.read().strip()} (pid {pid})")
    return found


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


# -- status


@click.command()
@click.argument("mountpoint", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(mountpoint: str | None, as_json: bool) -> None:
    """Say what is mounted, who serves it, and what is guarded.

    Without MOUNTPOINT: of all mounts. Needs no key, and never waits for a mount that hangs.
    """
    if mountpoint is None:
        entries = [entry for entry in mounts() if entry.fs_type in _OURS]
    else:
        entry = find(mountpoint, _OURS)
        if entry is None:
            raise NotMountedError(
                f"{mountpoint}: no encfs_js store is mounted there",
                hint="`encfs-js status` lists what is mounted; `encfs-js mount STORE MOUNTPOINT` mounts a store.",
            )
        entries = [entry]
    facts = [_facts(entry) for entry in entries]
    if as_json:
        print(json.dumps({"mounts": facts}, indent=1))
    elif not facts:
        print("no encfs_js store is mounted")
    else:
        for fact in facts:
            _print_facts(fact)


def _facts(entry: MountEntry) -> dict[str, Any]:
    """Collect what is known of one mount; None for what this user may not see."""
    facts: dict[str, Any] = dict.fromkeys(
        (
            "serving",
            "pid",
            "worker",
            "takeovers",
            "since",
            "store_id",
            "cipher",
            "epoch",
            "plaintext",
            "guard",
            "reencrypt",
            "problem",
        )
    )
    mounted = {"mountpoint": entry.mountpoint, "store": entry.source, "read_only": entry.read_only}
    if entry.fs_type == VIEW_TYPE:
        return {**mounted, "kind": "view", **facts, **_facts_of_view(entry)}
    try:
        holder = state.holder(entry.source)
        facts["serving"] = holder is not None
        facts |= {name: (holder or {}).get(name) for name in ("pid", "since")}
        facts |= _workers(entry)
        opened, warning = keystore.load(entry.source)
        facts["store_id"] = opened.store_id.hex()
        facts["cipher"] = opened.settings.cipher.label
        facts["epoch"] = opened.settings.epoch
        facts["plaintext"] = opened.settings.plaintext
        facts["guard"] = closed_as_json(guard.read(entry.source))
        facts["problem"] = warning or None
    except (OSError, ValueError, EncfsError) as problem:
        facts["problem"] = str(problem)
    return {**mounted, "kind": "mount", **facts}


def _facts_of_view(entry: MountEntry) -> dict[str, Any]:
    pid = presence.server_of(entry)
    if pid is None:
        return {"serving": presence.answers(entry.mountpoint)}
    return {"serving": True, "pid": pid, "since": presence.since(pid)}


def _workers(entry: MountEntry) -> dict[str, Any]:
    """Ask the supervisor who serves. Nothing where it does not answer, or may not be asked."""
    try:
        answer = control.ask(entry.source, {"do": "status"}, _PATIENCE_MS / 1000)
    except (OSError, ValueError):
        return {}
    return {name: answer.get(name) for name in ("worker", "takeovers", "reencrypt")}


def _print_facts(facts: dict[str, Any]) -> None:
    serving = {
        None: "unknown",
        True: f"process {facts['pid']} since {facts['since']}" if facts["pid"] else "unknown, and it answers",
        False: "nobody serves it: the daemon has died. encfs-js umount, then mount it again",
    }
    view = facts["kind"] == "view"
    lines = [
        ("store", shown(facts["store"]) + (" (read-only)" if facts["read_only"] and not view else "")),
        ("daemon", serving[facts["serving"]]),
    ]
    if view:
        lines.insert(1, ("view", "what nats-server has encrypted, in the clear and read-only"))
    if facts["takeovers"] is not None:
        times = f", taken over {plural(facts['takeovers'], 'time')}" if facts["takeovers"] else ""
        lines.append(("worker", f"process {facts['worker']}{times}" if facts["worker"] else f"being replaced{times}"))
    if facts["cipher"]:
        lines.append(("sealing", f"{facts['cipher']}, epoch {facts['epoch']}, plaintext: {facts['plaintext']}"))
    if facts["guard"] is not None:
        lines.append(
            (
                "guard",
                f"closed over {plural(len(facts['guard']), 'directory', 'directories')}" if facts["guard"] else "open",
            )
        )
        lines += [("", f"{shown(c['directory'])}: {shown(c['file'])} page {c['page']}") for c in facts["guard"]]
    if facts["reencrypt"]:
        done = facts["reencrypt"]
        lines.append(
            ("anew", f"{done['state']}, {done.get('files_done', 0)} of {plural(done.get('files', 0), 'file')}")
        )
    if facts["problem"]:
        lines.append(("problem", facts["problem"]))
    print(shown(facts["mountpoint"]))
    for name, text in lines:
        print(f"  {name:<8} {text}")
