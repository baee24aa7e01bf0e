"""What happens when a store that somebody changed is used again.

The store is mounted, nats-server started, its streams created as most applications do at their start (which does nothing where a
stream is there), every message read, all stopped. Then the change is undone (the files that were changed get their content
back; on a mount the guard is opened, as its operator does), and everything is read once more.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from encfs_js.compare import modes, processes, victim
from encfs_js.compare.client import connected
from encfs_js.compare.judging import NOTHING, Differences, Seen, compare, count
from encfs_js.compare.processes import RefusedError, RunError
from encfs_js.compare.reading import Reading, read

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from encfs_js.compare.modes import Daemon, Store
    from encfs_js.compare.server import Server
    from encfs_js.compare.victim import Victim

_OURS: Final = re.compile(r"encfs-js: (?:WARNING|ERROR|CRITICAL|warning|error): .*")
_SECUREFS: Final = re.compile(r"^(?:\[(?:Warning|Error)\]|[^\[]).*", re.MULTILINE)
_SECUREFS_HEAD: Final = re.compile(r"^\[(Warning|Error)\] \[0x[0-9a-f]+\] \[[^]]*\] *")
_GOCRYPTFS_HEAD: Final = re.compile(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ")
_VOLATILE: Final = re.compile(r"0x[0-9a-fx]+|\d+")
_TIMES_SAID: Final = 12  # lines that are kept of what was said
_STOP: Final = 15.0  # seconds that a server on a damaged store has to stop

Unit = dict[str, range]  # the messages that lie in what was attacked, by stream


class Run(NamedTuple):
    """One use of a store. refused: why it could not be used, or ""; said: what was complained of, in logs and answers."""

    refused: str
    reading: Reading
    said: list[str]


def use(
    store: Store,
    of: Victim,
    check: Callable[[], None],
    *,
    key: str | None = None,
    prev_key: str | None = None,
    cipher: str | None = None,
) -> Run:
    """Use a store once, as an application does. Raises RunError when something hangs.

    key: another one than its own; prev_key, cipher: what a server that encrypts is told besides.
    """
    nothing, at = Reading({}, {}), _size(store.log)
    daemon = modes.Daemon(store)
    server = encrypting(store, of, key=key, prev_key=prev_key, cipher=cipher)
    try:
        daemon.mount(key=key)
    except RefusedError as refusal:
        return Run(_reason(refusal.said), nothing, [])
    try:
        server.begin()
        check()
        try:
            server.ready()
        except RefusedError as refusal:
            return Run(
                _reason(refusal.said), nothing, _relative([*server.complaints(), *_daemon_said(store, at)], store)
            )
        with connected(server.port) as connection:
            refused = victim.create_streams(connection)
            reading = read(connection, of.wanted, check)
        hung = _stopped(server.process)
        server.process = None
        said = [*server.complaints(), *refused, *hung]
        _unmount(daemon)
        return Run("", reading, _relative([*said, *_daemon_said(store, at)], store))
    finally:
        server.kill()
        daemon.kill()


def encrypting(
    store: Store, of: Victim, *, key: str | None = None, prev_key: str | None = None, cipher: str | None = None
) -> Server:
    """Return the server for a store, told another key, a previous one or another cipher where it encrypts itself."""
    server = victim.server_of(store, of.program)
    if server.key is not None:
        server.key = key or server.key
        server.prev_key = prev_key
        server.cipher = cipher or server.cipher
    return server


def _stopped(process: subprocess.Popen[bytes] | None) -> list[str]:
    if process is None:
        return []
    try:
        processes.stop(process, "nats-server", _STOP)
    except RunError as error:
        processes.kill(process)
        return [str(error)]
    return []


def _unmount(daemon: Daemon) -> None:
    """Unmount; a daemon that complains with its exit code has done so in its log as well."""
    with suppress(RefusedError):
        daemon.unmount()


def _reason(said: str) -> str:
    """Return the line of an output that says why."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for mark in ("[FTL]", "not empty", "error:", "[Error]", "rror", "ailed", "[ERR]"):
        for line in lines:
            if mark in line and "hint:" not in line:
                return _bare(line)
    return lines[-1] if lines else "it ended without a word"


def reason(said: str, store: Store) -> str:
    """Return the line of a command's output that says why, without this run's paths."""
    return _without(_reason(said), store)


def _bare(line: str) -> str:
    line = re.sub(r"^\[\d+\] \S+ \S+ ", "", line)
    line = _GOCRYPTFS_HEAD.sub("", _SECUREFS_HEAD.sub(r"[\1] ", line))
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _daemon_said(store: Store, at: int) -> list[str]:
    """Return what a daemon's log, behind offset `at`, complains of."""
    if not os.path.exists(store.log):
        return []
    with open(store.log, encoding="utf-8", errors="replace") as file:
        file.seek(at)
        text = file.read()
    if store.mode.kind == "mount":
        return [line.removeprefix("encfs-js: ") for line in _OURS.findall(text)]
    lines = _SECUREFS.findall(text) if store.mode.name == "securefs" else text.splitlines()
    return [_bare(line) for line in lines if line.strip()]


def normal(line: str) -> str:
    """Return a log line without its numbers, which differ from run to run."""
    return _VOLATILE.sub("#", line)


def _relative(lines: list[str], store: Store) -> list[str]:
    """Return log lines with paths from the store_dir on: where the store lies is this run's alone."""
    for path in (store.backing, store.directory, store.root):
        lines = [line.replace(path + "/", "") for line in lines]
    return lines


def said_of(run: Run, noise: frozenset[str]) -> list[str]:
    """Return each thing that was said in a run, once, and without what is said of an untouched store."""
    found: dict[str, str] = {}
    for line in run.said:
        if normal(line) not in noise:
            found.setdefault(normal(line), line)
    return list(found.values())[:_TIMES_SAID]


def block_sizes(store: Store, of: Victim) -> dict[str, int]:
    """Return the sizes of the backing files of the message blocks that are there, by the plain path."""
    paths = {plain: os.path.join(store.backing, of.paths[plain]) for plain in of.sizes}
    return {plain: os.path.getsize(path) for plain, path in paths.items() if os.path.exists(path)}


def observe(
    of: Victim,
    store: Store,
    undo: Callable[[], None],
    unit: Unit,
    check: Callable[[], None],
    *,
    key: str | None = None,
) -> Seen:
    """Use a store that was attacked, undo the attack, use it again. key: what it is used with the first time.

    Raises RunError when something hangs, OSError.
    """
    left = {plain: size for plain, size in block_sizes(store, of).items() if size}
    found = _verified(store) if store.mode.kind == "mount" and key is None else ""
    run = use(store, of, check, key=key)
    after = block_sizes(store, of)
    # A record that the attack had torn already is no message any more: to cut off what is left of it destroys nothing.
    record = victim.record_length(victim.STREAM, 1)
    lost = [
        f"{'/'.join(plain.split('/')[3:])} {'is gone' if plain not in after else f'was cut from {size} to {after[plain]} bytes'}"
        for plain, size in left.items()
        if plain not in after or size - after[plain] >= record
    ]
    undo()
    _open_guard(store)
    again = use(store, of, check)
    left_out = compare(again.reading, of.late)
    still = again.refused or count(left_out)
    now = Differences() if run.refused else compare(run.reading, of.late)
    inside = [(stream, number) for stream, numbers in unit.items() for number in numbers]
    inside = [(s, n) for s, n in inside if not isinstance(of.late.messages[s][n], str)]
    served = [(s, n) for s, n in inside if run.reading.messages.get(s, {}).get(n) == of.late.messages[s][n]]
    return Seen(
        altered=now.altered,
        missing=now.missing,
        unanswered=now.unanswered,
        consumers=now.consumers,
        refused=_without(run.refused, store),
        said=tuple(said_of(run, of.noise)),
        lost=tuple(lost),
        unit=len(inside),
        served=len(served),
        back=not still,
        still=_without(still, store),
        found=found,
    )


def _without(line: str, store: Store) -> str:
    return line.replace(store.backing, "STORE").replace(store.directory, "MOUNTPOINT").replace(store.root, "")


def digest(directory: str, but: str = "") -> str:
    """Return a hash over the names and contents of a directory, without files and directories whose name begins with `but`."""
    found = hashlib.sha256()
    for parent, below, names in os.walk(directory):
        below[:] = sorted(name for name in below if not (but and name.startswith(but)))
        for name in sorted(names):
            if but and name.startswith(but):
                continue
            path = os.path.join(parent, name)
            found.update(os.path.relpath(path, directory).encode() + b"\0")
            with open(path, "rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def contents(directory: str) -> list[tuple[str, bytes]]:
    """Return the files below a directory: path from there on, and bytes."""
    found = []
    for parent, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                found.append((os.path.relpath(path, directory), file.read()))
    return found


def _verified(store: Store) -> str:
    """Return what `encfs-js verify` finds in a store, in a few words, or NOTHING."""
    try:
        said = processes.call([*modes.OURS, "verify", store.backing, "--json"], {"JS_KEY": store.key})
    except RefusedError as refusal:
        said = refusal.said
    try:  # the error is a line beside the report
        report = msgspec.json.decode(said[said.index("{") : said.rindex("}") + 1], type=dict)
    except (ValueError, msgspec.DecodeError):
        return _without(_reason(said), store)
    if not (damage := [*report["damage"], *report["own_damage"], *report["unreadable"]]):
        return _without(report["warnings"][0], store) if report["warnings"] else NOTHING
    first = damage[0]
    page = f" page {first['page']}" if first.get("page") is not None else ""
    return f"{'/'.join(first.get('file', first.get('path', '')).split('/')[-2:])}{page}"


def _open_guard(store: Store) -> None:
    """Open the guard of a mount where it is closed, as its operator does after putting the files back."""
    with suppress(OSError, msgspec.DecodeError, KeyError, TypeError):
        with open(os.path.join(store.backing, ".encfs_js", "guard"), "rb") as file:
            closed = msgspec.json.decode(file.read())["closed"]
        if store.mode.kind == "mount" and closed:
            processes.call([*modes.OURS, "guard", "clear", store.backing])
