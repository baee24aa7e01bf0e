"""kill -9 for whoever changes the key of a store, or encrypts it anew, at different moments; then the work is done to its end."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from typing import TYPE_CHECKING, Final

from encfs_js.compare import modes, observing, processes, telling, victim
from encfs_js.compare.judging import Seen, compare, count, judge
from encfs_js.compare.mistakes import NO_KEY
from encfs_js.compare.processes import RefusedError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encfs_js.compare.modes import Store
    from encfs_js.compare.result import Word
    from encfs_js.compare.victim import Victim

_STARTING: Final = 0.25  # the part of its time in which a command only starts


def _delays(duration: float, kills: int, begin: float = 0.0) -> list[float]:
    """Return when to kill: spread from a part of the time that it takes undisturbed to a little behind that time."""
    return [duration * (begin + (1.15 - begin) * (i + 0.5) / kills) for i in range(kills)]


def kill_key_change(kills: int) -> Callable[[Victim, str, Callable[[], None]], tuple[Word, str]]:
    """Make the attack that kills whoever changes the key, so many times."""

    def attack(of: Victim, name: str, check: Callable[[], None]) -> tuple[Word, str]:
        if of.mode.kind == "plain":
            return "not run", NO_KEY
        if of.mode.kind == "server":
            return _kill_server(of, name, check, kills, key=secrets.token_hex(16))
        with of.copied("late", name) as store:
            return _kill_command(of, store, check, kills)

    return attack


def kill_reencrypt(kills: int) -> Callable[[Victim, str, Callable[[], None]], tuple[Word, str]]:
    """Make the attack that kills whoever encrypts the store anew, so many times."""

    def attack(of: Victim, name: str, check: Callable[[], None]) -> tuple[Word, str]:
        if of.mode.kind == "plain":
            return "not run", NO_KEY
        if of.mode.kind == "reference":
            return "not run", "It cannot encrypt a store anew."
        if of.mode.kind == "server":
            other = "aes" if of.mode.cipher == "chachapoly" else "chachapoly"
            return _kill_server(of, name, check, kills, cipher=other)
        with of.copied("late", name) as store:
            return _kill_reencrypt(of, store, check, kills)

    return attack


def _kill_server(
    of: Victim, name: str, check: Callable[[], None], kills: int, *, key: str | None = None, cipher: str | None = None
) -> tuple[Word, str]:
    """Kill nats-server while it converts a store at its start to another key or cipher, then let it do that."""
    seen: list[Seen] = []
    delays: list[float | None] = [None, *([0.0] * kills)]
    for i, delay in enumerate(delays):
        check()
        with of.copied("late", f"{name}-{i}") as store:
            server = observing.encrypting(store, of, key=key, prev_key=store.key if key else None, cipher=cipher)
            began = time.monotonic()
            try:
                server.begin()
                if delay is None:
                    server.ready()
                    delays[1:] = _delays(time.monotonic() - began, kills)
                    server.stop()
                else:
                    time.sleep(delay)
            finally:
                server.kill()
            run = observing.use(store, of, check, key=key, prev_key=store.key if key else None, cipher=cipher)
            seen.append(_afterwards(of, run))
    word = telling.worst([judge(each) for each in seen])
    whole = "lost nothing" if not seen[0].hurt and not seen[0].refused else telling.tell(seen[0])
    hurt = [each for each in seen[1:] if each.hurt or each.refused]
    if not hurt:
        return (
            word,
            f"Undisturbed: {telling.inner(whole)}. After each of {kills} kills all was there.",
        )
    return word, (
        f"Undisturbed: {telling.inner(whole)}. After {len(hurt)} of {kills} kills something is gone: {telling.tell(hurt[0])}"
    )


def _afterwards(of: Victim, run: observing.Run) -> Seen:
    """Return what is left in the end: there is nothing to undo."""
    if run.refused:
        return Seen(refused=run.refused, back=False, still="everything", undone=False)
    now = compare(run.reading, of.late)
    left = count(now)
    return Seen(
        altered=now.altered,
        missing=now.missing,
        unanswered=now.unanswered,
        consumers=now.consumers,
        said=tuple(observing.said_of(run, of.noise)) if left else (),
        back=not left,
        still=left,
        undone=False,
    )


def _kill_command(of: Victim, store: Store, check: Callable[[], None], kills: int) -> tuple[Word, str]:
    """Kill the command that changes the key of a mount's store again and again; each time one of both keys must open it."""
    before = _data(store)
    began = time.monotonic()
    _change(store, new := secrets.token_hex(16)).wait(processes.PATIENCE)
    duration = time.monotonic() - began
    if _opens(store, [new]) != new:
        raise RunError(
            f"the key of {store.mode.name} was not changed: {processes.tail(os.path.join(store.root, 'change.log'))}"
        )
    store.key, changed = new, 0
    for delay in _delays(duration, kills, _STARTING):
        check()
        process = _change(store, new := secrets.token_hex(16))
        time.sleep(delay)
        processes.kill(process)
        opened = _opens(store, [new, store.key])
        if not opened:
            return "data destroyed", f"Killed after {delay:.3f} s, neither the old nor the new key opens the store."
        changed += opened == new
        store.key = opened
        if _data(store) != before:
            return "data destroyed", f"Killed after {delay:.3f} s: the files themselves were changed."
    if store.mode.kind == "reference":
        modes.write_password(store, store.key)
    seen = _afterwards(of, observing.use(store, of, check))
    return judge(seen), (
        f"After each of {kills} kills, at different moments of the {duration:.2f} s that it takes, the store opened:"
        f" {changed} times with the new key, {kills - changed} with the old one; {telling.inner(telling.tell(seen))}."
    )


def _data(store: Store) -> str:
    """Return a hash over a store without where its key is."""
    own = {"gocryptfs": "gocryptfs.conf", "securefs": ".securefs.json"}
    return observing.digest(store.backing, own.get(store.mode.name, ".encfs_js"))


def _key_file(store: Store, name: str, key: str) -> str:
    path = os.path.join(store.root, name)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(key)
    return path


def _change(store: Store, new: str) -> subprocess.Popen[bytes]:
    """Start the command that changes a store's key."""
    log = os.path.join(store.root, "change.log")
    given = _key_file(store, "new-key", new)
    if store.mode.kind == "mount":
        command = [*modes.OURS, "key", "change", store.backing, "--new-key-file", given]
        return processes.start(command, log, {"JS_KEY": store.key})
    modes.write_password(store, store.key)
    if store.mode.name == "securefs":
        return processes.start([*victim.securefs_chpass(store.password, given), "-r", "1", store.backing], log)
    answers = _key_file(store, "answers", f"{store.key}\n{new}\n")
    with open(log, "ab") as output, open(answers, "rb") as answer:
        return subprocess.Popen(
            ["gocryptfs", "-passwd", "-q", store.backing],
            stdin=answer,
            stdout=output,
            stderr=output,
            env=processes.environment({}),
            start_new_session=True,
        )


def _opens(store: Store, keys: Sequence[str]) -> str:
    """Return the first of some keys that opens a store, "" if none does."""
    for key in keys:
        try:
            if store.mode.kind == "mount":
                processes.call([*modes.OURS, "verify", store.backing], {"JS_KEY": key})
            else:
                daemon = modes.Daemon(store)
                try:
                    daemon.mount(key=key)
                finally:
                    daemon.kill()  # nothing was written; and one that has only just mounted is busy
        except RefusedError:
            continue
        return key
    return ""


def _kill_reencrypt(of: Victim, store: Store, check: Callable[[], None], kills: int) -> tuple[Word, str]:
    """Kill the command that seals all files under a new volume key; after each kill every page must authenticate."""
    command = [*modes.OURS, "reencrypt", store.backing, "--new-epoch"]
    began = time.monotonic()
    processes.call(command, {"JS_KEY": store.key})
    duration = time.monotonic() - began
    for delay in _delays(duration, kills, _STARTING):
        check()
        process = processes.start(command, os.path.join(store.root, "reencrypt.log"), {"JS_KEY": store.key})
        time.sleep(delay)
        processes.kill(process)
        try:
            processes.call([*modes.OURS, "verify", store.backing], {"JS_KEY": store.key})
        except RefusedError as refusal:
            return (
                "data destroyed",
                f"Killed after {delay:.3f} s: {telling.short(observing.reason(refusal.said, store))}",
            )
    processes.call([*modes.OURS, "reencrypt", store.backing], {"JS_KEY": store.key})
    seen = _afterwards(of, observing.use(store, of, check))
    return judge(seen), (
        f"After each of {kills} kills, at different moments of the {duration:.2f} s that it takes, every page was authentic;"
        f" {telling.inner(telling.tell(seen))}."
    )
